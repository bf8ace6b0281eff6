"""The papers' systems: closed forms that each must reach, and models that each must refuse."""

import inspect
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_ebipla import EBIPLA, Contrastive, ModelError, Persistent, WeightedParticles, recipes
from numpyro_ebipla.kernels import ULA
from numpyro_ebipla.recipes import _RECIPES
from tests.models import global_latent, hierarchy, latent_energy, observed_energy

M = 40
Y = (1.0 + np.sqrt(2) * np.random.default_rng(10).normal(size=M)).astype(np.float32)


def run(ebipla, *args, seed=0, **kwargs):
    return ebipla.run(random.key(seed), *args, progress_bar=False, **kwargs)


@pytest.mark.unit
@pytest.mark.parametrize("name", ["ebipla", "ipla", "pgd", "soul", "kiplmc", "lebm", "jala_em"])
def test_overrides_of_moves_and_kernel_leave_a_recipe_what_it_is(name):
    """They once dropped its particles: ``jala_em(num_moves=2)`` was MALA without weights."""
    recipe = getattr(recipes, name)
    own, kernel = recipe(hierarchy).posterior, ULA(0.123)
    changed = recipe(hierarchy, kernel=kernel).posterior
    assert type(changed) is type(own) and changed.kernel == kernel and changed.num_moves == own.num_moves
    if name == "jala_em":
        with pytest.raises(ValueError, match="one unadjusted move per step"):
            recipe(hierarchy, num_moves=2)
    else:
        changed = recipe(hierarchy, num_moves=7).posterior
        assert type(changed) is type(own) and changed.kernel == own.kernel and changed.num_moves == 7


def test_lebm_as_it_comes_has_one_particle():
    """The diagnostics' halves of one particle were indexed by a list, after all steps: LEBM's own N."""
    fit = run(recipes.lebm(latent_energy, num_steps=3, num_samples=2, warmup=1), Y)
    assert fit.get_samples()["x"].shape == (1, 2, M) and fit.draws.score.shape == (2, M, 1)


# --- what they must reach -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ipla", "pgd", "soul", "kiplmc", "jala_em"])
def test_the_hierarchy_ends_at_the_mean_of_the_data(name):
    """MMLE ȳ. With the sum over the data its information is M/2, so θ's noise has a variance of 2/(M N)."""
    step = {"kiplmc": 0.1, "soul": 0.02}.get(name, 0.02)
    ebipla = getattr(recipes, name)(
        hierarchy, step_size=step, num_particles=50, num_steps=1000, averaging=0.0, num_samples=2
    )
    fit = run(ebipla, Y)
    error = np.sqrt(2 / (M * 50))  # of one draw of θ; the average's is smaller, the particles' noise larger
    assert fit.stopped is None
    # the plain average still holds the first steps: a part of about 2/(M h) / K of the way
    assert float(fit.params["mean"]) == pytest.approx(float(Y.mean()), abs=4 * error + 2 / (M * step) / 1000)


def test_weighted_particles_give_the_marginal_likelihood():
    fit = run(recipes.jala_em(hierarchy, step_size=0.02, num_steps=300, num_samples=2), Y)
    value, error = fit.log_marginal_likelihood()
    exact = dist.Normal(fit.params["mean"], np.sqrt(2)).log_prob(Y).sum()
    assert float(error) < 2 and abs(float(value - exact)) < 3 * float(error)
    # A refusal of weights that are not finite once needed numbers, so it could not be compiled (as 100 trials want).
    compiled = jax.jit(lambda params: replace(fit, params=params).log_marginal_likelihood())
    np.testing.assert_allclose(compiled(fit.params), (value, error), rtol=1e-5)


@pytest.mark.parametrize("batch_size", [None, 15])
def test_the_marginal_likelihood_is_unbiased_over_repetitions(batch_size):
    """Six fits of MALA particles: their mean lies within 3 standard errors of the truth, and the errors are honest."""
    ebipla = EBIPLA(hierarchy, num_particles=20, num_steps=60, posterior=WeightedParticles(), num_samples=2, warmup=0)
    z = []
    for seed in range(6):
        fit = run(ebipla, Y, batch_size=batch_size, seed=seed)
        value, error = fit.log_marginal_likelihood()
        exact = dist.Normal(fit.params["mean"], np.sqrt(2)).log_prob(Y).sum()
        z.append(float((value - exact) / error))
    assert abs(np.mean(z)) < 3 / np.sqrt(6)
    assert np.std(z) < 2


def test_the_marginal_likelihood_of_a_global_latent():
    fit = run(recipes.jala_em(global_latent, step_size=0.005, num_particles=100, num_steps=300, num_samples=2), Y)
    value, error = fit.log_marginal_likelihood()
    exact = dist.MultivariateNormal(jnp.full(M, fit.params["mean"]), jnp.eye(M) + 1).log_prob(Y)
    assert float(error) < 0.5 and abs(float(value - exact)) < 3 * float(error)


def test_energies_add_their_normaliser_to_the_marginal_likelihood():
    ebipla = EBIPLA(latent_energy, num_steps=300, posterior=WeightedParticles(), num_samples=2)
    fit = run(ebipla, Y)
    value, error = fit.log_marginal_likelihood()
    exact = dist.Normal(0, jnp.sqrt(1 + 1 / (1 + fit.params["a"]))).log_prob(Y).sum()
    assert abs(float(value - exact)) < 3 * float(error)


def test_the_marginal_likelihood_needs_weights():
    fit = run(EBIPLA(hierarchy, num_steps=1, num_samples=2), Y)
    with pytest.raises(ValueError, match="WeightedParticles"):
        fit.log_marginal_likelihood()


@pytest.mark.slow
def test_lebm_with_chains_long_enough_is_maximum_likelihood():
    """Short-run chains are biased by what they fall short of: with 200 moves, hardly."""
    from numpyro_ebipla import MALA, ShortRun, ShortRunParticles

    y = 0.5 * Y
    ebipla = recipes.lebm(
        latent_energy,
        posterior=ShortRunParticles(MALA(0.5), num_moves=20),
        prior=ShortRun(1000, MALA(0.5), num_moves=20),
        optim=None,
        num_particles=20,
        num_steps=600,
        averaging=8.0,
        num_samples=2,
    )
    fit = run(ebipla, y + jnp.sign(y) * 1.0)
    second = float(jnp.mean((y + jnp.sign(y)) ** 2))
    variance = 1 / (1 + float(fit.params["a"])) + 1
    assert variance == pytest.approx(second, rel=0.05)


# --- what they must refuse ----------------------------------------------------------------------------


@pytest.mark.unit
@pytest.mark.parametrize(
    ("name", "model", "kwargs", "message"),
    [
        ("pgd", latent_energy, {}, r"recipes\.pgd .* recipes\.ebipla"),
        ("ipla", latent_energy, {}, r"recipes\.ipla .* recipes\.ebipla"),
        ("soul", latent_energy, {}, r"recipes\.soul .* recipes\.ebipla"),
        ("kiplmc", latent_energy, {}, r"recipes\.kiplmc .* recipes\.ebipla"),
        ("jala_em", latent_energy, {}, r"recipes\.jala_em .* recipes\.ebipla"),
        ("jala_em", global_latent, {"batch_size": 10}, r"recipes\.jala_em.*'z'.*recipes\.ipla"),
        ("jarzynski_ebm", latent_energy, {}, r"jarzynski_ebm.*'x'.*Persistent\(weighted=True\)"),
        ("ebipla", hierarchy, {}, r"recipes\.ebipla .* recipes\.ipla"),
        ("lebm", hierarchy, {}, r"recipes\.lebm .* recipes\.pgd"),
        ("lebm", observed_energy, {}, r"recipes\.lebm .* recipes\.pcd"),
        ("pcd", hierarchy, {}, r"recipes\.pcd .* recipes\.pgd"),
        ("cd", hierarchy, {}, r"recipes\.cd .* recipes\.pgd"),
    ],
)
def test_recipes_refuse_what_their_paper_cannot_do(name, model, kwargs, message):
    with pytest.raises(ModelError, match=message):
        getattr(recipes, name)(model).init(random.key(0), Y, **kwargs)


@pytest.mark.unit
def test_weights_of_a_global_latent_need_all_data():
    with pytest.raises(ModelError, match=r"'z' is global.*batch_size"):
        EBIPLA(global_latent, posterior=WeightedParticles()).init(random.key(0), Y, batch_size=10)


@pytest.mark.unit
def test_contrastive_divergence_needs_chains_that_start_at_the_data():
    with pytest.raises(ValueError, match=r"Persistent does not.*recipes\.pcd"):
        recipes.cd(observed_energy, prior=Persistent())
    recipes.cd(observed_energy, prior=Contrastive(num_moves=3))


@pytest.mark.unit
@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_chains_need_at_least_one_move(bad):
    from numpyro_ebipla import Particles, ShortRun, ShortRunParticles

    for make in (Contrastive, ShortRun, ShortRunParticles, Particles):
        with pytest.raises(ValueError, match=r"num_moves must be an integer of at least 1"):
            make(num_moves=bad)
    with pytest.raises(ValueError, match="num_moves"):
        recipes.cd(observed_energy, num_moves=bad)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightedParticles(ULA(0.1), num_moves=2), "one unadjusted move"),
        (lambda: WeightedParticles(threshold=2.0), "threshold"),
        (lambda: Contrastive(reset_every=0), "reset_every"),
        (lambda: EBIPLA(hierarchy, posterior=WeightedParticles(), kernel=ULA()), "belong to posterior"),
        (lambda: EBIPLA(hierarchy, optim={"energy": None}), "keys"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match="posterior must be"):
        EBIPLA(hierarchy, posterior="short run")


# --- the table ----------------------------------------------------------------------------------------


@pytest.mark.unit
def test_every_recipe_is_in_the_table_with_its_source():
    public = {n for n, f in inspect.getmembers(recipes, inspect.isfunction) if f.__module__ == recipes.__name__}
    public = {n for n in public if not n.startswith("_")} - {"table"}
    assert set(_RECIPES) == public
    text = recipes.table()
    for name, (recipe, source, _) in _RECIPES.items():
        assert f"| `{name}` | {source} |" in text
        assert source.split(" (")[0].split(",")[0] in recipe.__doc__
