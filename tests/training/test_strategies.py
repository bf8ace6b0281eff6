"""One contract for all ways to keep particles and walkers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from numpyro_ebipla import (
    MALA,
    ULA,
    Annealed,
    Contrastive,
    Particles,
    Persistent,
    ShortRun,
    ShortRunParticles,
    SuccessiveParticles,
    Tempered,
    Underdamped,
    WeightedParticles,
)
from numpyro_ebipla._core.state import Latents
from numpyro_ebipla.particles import Block
from numpyro_ebipla.particles.block import Adaptations, Terms
from numpyro_ebipla.particles.moves import evaluate_at
from numpyro_ebipla.smc.density import TiltedDensity
from tests.models import fitter, latent_energy, observed_energy

PLAIN = MALA(0.3, precondition=False, adapt_step=False)
P, N, B = 8, 4, 3

PRIORS = [
    Persistent(P, ULA(0.1)),
    Persistent(P, PLAIN, num_moves=2),
    Persistent(P, Underdamped(0.1)),
    Persistent(P, ULA(0.1), weighted=True, threshold=0.0),
    Persistent(P, PLAIN, weighted=True, threshold=0.0),
    Annealed(P),
    Tempered(P, num_rungs=3),
    ShortRun(P, num_moves=3),
    ShortRun(P, Underdamped(0.1), num_moves=3),
    Contrastive(P, PLAIN, num_moves=2, reset_every=2),
    Contrastive(P, Underdamped(0.1)),
]
POSTERIORS = [
    Particles(),
    Particles(ULA(0.1)),
    Particles(Underdamped(0.1), num_moves=2),
    ShortRunParticles(num_moves=3),
    ShortRunParticles(Underdamped(0.1), num_moves=2),
    SuccessiveParticles(),
    SuccessiveParticles(PLAIN, num_moves=2),
    WeightedParticles(PLAIN),
    WeightedParticles(ULA(0.1)),
]


def density():
    """N(0, I) in two dimensions, tilted to N(0, I/2)."""
    return TiltedDensity(
        lambda x: -0.5 * jnp.sum(x**2, -1) - np.log(2 * np.pi),
        lambda x: 0.5 * jnp.sum(x**2, -1),
        lambda key, num: random.normal(key, (num, 2)),
    )


def like(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


# --- walkers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", PRIORS, ids=repr)
def test_walkers_keep_their_shapes_and_weights(strategy):
    at = density()
    state = strategy.init(random.key(0), at)
    particles = random.normal(random.key(1), (5, 2)) if strategy.follows_particles else None
    walk, prepared, _ = strategy.prepare(random.key(2), at, state, particles)
    after, _ = strategy.advance(random.key(3), at, at, prepared, None)
    num = P * getattr(strategy, "num_rungs", 1)  # all rungs of a ladder enter the gradient
    assert walk.position.shape == (num, 2) and walk.weight.shape == (num,)
    assert float(walk.weight.sum()) == pytest.approx(1, abs=1e-5)
    assert like(state) == like(prepared) == like(after)


@pytest.mark.parametrize("strategy", PRIORS, ids=repr)
def test_walkers_are_functions_of_their_key(strategy):
    at = density()
    particles = random.normal(random.key(1), (5, 2)) if strategy.follows_particles else None

    def run(key):
        state = strategy.init(random.key(0), at)
        walk, state, _ = strategy.prepare(key, at, state, particles)
        return walk.position, strategy.advance(key, at, at, state, None)[0]

    for a, b in zip(jax.tree.leaves(run(random.key(4))), jax.tree.leaves(run(random.key(4))), strict=True):
        assert np.array_equal(a, b, equal_nan=True)
    moved = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), run(random.key(4)), run(random.key(5)))
    assert not all(jax.tree.leaves(moved))


@pytest.mark.unit
@pytest.mark.parametrize("strategy", [s for s in PRIORS if isinstance(s, Persistent)], ids=repr)
def test_persistent_walkers_are_independent(strategy):
    at = density()
    state = strategy.init(random.key(0), at)
    other = state._replace(position=state.position.at[0].add(1.0))
    if state.jarzynski is not None:
        log_density = at.log_density(other.position)
        other = other._replace(jarzynski=state.jarzynski._replace(log_density=log_density))
    a, b = (strategy.advance(random.key(1), at, at, s, None)[0].position for s in (state, other))
    assert np.array_equal(a[1:], b[1:]) and not np.array_equal(a[0], b[0])


@pytest.mark.unit
def test_contrastive_walkers_start_at_the_particles_and_only_when_it_is_time():
    at, particles = density(), jnp.arange(16.0).reshape(8, 2) * 10
    strategy = Contrastive(P, ULA(1e-12), reset_every=2)
    state = strategy.init(random.key(0), at)
    first, state, _ = strategy.prepare(random.key(1), at, state, particles)
    rows = lambda x: sorted(map(tuple, np.round(np.asarray(x), 3).tolist()))
    assert rows(first.position) == rows(particles)
    second, state, _ = strategy.prepare(random.key(2), at, state, particles + 1)
    np.testing.assert_allclose(second.position, first.position, atol=1e-3)
    third, _, _ = strategy.prepare(random.key(3), at, state, particles + 1)
    assert rows(third.position) == rows(particles + 1)


def test_short_run_walkers_start_at_the_base():
    """After K moves of a step that goes nowhere they are draws of the base; with many real moves, of the prior."""
    at = density()
    for strategy, variance in ((ShortRun(4000, ULA(1e-12), 2), 1.0), (ShortRun(4000, MALA(0.5), 60), 0.5)):
        walk, _, _ = strategy.prepare(random.key(1), at, strategy.init(random.key(0), at))
        assert float(walk.position.var()) == pytest.approx(variance, abs=4 * variance * np.sqrt(2 / 8000))


# --- particles ----------------------------------------------------------------------------------------


def log_joint(latents):
    """Independent N(0, 1) chains."""
    x = latents.local["x"]
    return Terms(-0.5 * x**2, jnp.zeros(x.shape[0]))


def block_of(strategy, key=0):
    x = Latents({"x": random.normal(random.key(key), (N, B))}, {})
    momentum = x if strategy.kernel.has_momentum else None
    flat = jnp.zeros((N, B))
    memory = strategy.start(x, flat, log_joint(x).per_datum, flat[:1])
    return Block(x, momentum, memory)


def draw(key):
    return Latents({"x": random.normal(key, (N, B))}, {})


def once(strategy, block, key=1):
    adapt = Adaptations(strategy.kernel.init(block.latents.local, 2), strategy.kernel.init({}, 1))
    ready = strategy.prepare(random.key(key), draw, log_joint, 1.0, block, adapt)
    known = ready.known or evaluate_at(log_joint, 1.0, ready.block.latents)
    return ready, strategy.advance(random.key(key + 1), log_joint, 1.0, ready.block, known, ready.adapt)


@pytest.mark.parametrize("strategy", POSTERIORS, ids=repr)
def test_particles_keep_their_shapes(strategy):
    block = block_of(strategy)
    ready, (after, adapt, _) = once(strategy, block)
    assert like(block) == like(ready.block) == like(after)
    assert like(ready.adapt) == like(adapt)
    assert ready.num_particles == N
    if strategy.weighted:
        np.testing.assert_allclose(ready.weight.sum(0), 1, rtol=1e-5)


@pytest.mark.unit
@pytest.mark.parametrize("strategy", [s for s in POSTERIORS if type(s) is Particles], ids=repr)
def test_preparing_persistent_particles_changes_nothing(strategy):
    block = block_of(strategy)
    assert once(strategy, block)[0].block is block


@pytest.mark.unit
@pytest.mark.parametrize("strategy", [s for s in POSTERIORS if isinstance(s, ShortRunParticles)], ids=repr)
def test_short_run_particles_forget_where_they_were(strategy):
    one, other = (once(strategy, block_of(strategy, key))[1][0] for key in (0, 7))
    assert np.array_equal(one.latents.local["x"], other.latents.local["x"])


@pytest.mark.unit
def test_successive_particles_are_one_chain():
    """N states one after another: those of N steps of a single particle with the same keys."""
    strategy = SuccessiveParticles(ULA(0.1))
    block = block_of(strategy)
    ready, _ = once(strategy, block)
    x, single = Latents({"x": block.latents.local["x"][-1:]}, {}), Particles(ULA(0.1))
    adapt = Adaptations(single.kernel.init(x.local, 2), single.kernel.init({}, 1))
    for n, key in enumerate(random.split(random.key(1), N)):
        known = evaluate_at(log_joint, 1.0, x)
        here, adapt, _ = single.advance(key, log_joint, 1.0, Block(x), known, adapt)
        x = here.latents
        np.testing.assert_allclose(ready.block.latents.local["x"][n], x.local["x"][0], rtol=1e-6)


@pytest.mark.unit
@pytest.mark.parametrize(
    "strategy", [Particles(ULA(0.1)), Particles(PLAIN, 2), WeightedParticles(PLAIN, threshold=0.0)], ids=repr
)
def test_particles_are_independent(strategy):
    block = block_of(strategy)
    x = Latents({"x": block.latents.local["x"].at[0, 0].add(1.0)}, {})
    other = block._replace(latents=x)
    if strategy.weighted:
        flat = jnp.zeros((N, B))
        other = other._replace(memory=strategy.start(x, flat, log_joint(x).per_datum, flat[:1]))
    a, b = (np.asarray(once(strategy, which)[1][0].latents.local["x"]) for which in (block, other))
    changed = a != b
    assert changed[0, 0] and changed.sum() == 1


# --- whole systems ------------------------------------------------------------------------------------

SYSTEMS = [
    {"posterior": ShortRunParticles(num_moves=2), "prior": ShortRun(P, num_moves=2)},
    {"posterior": WeightedParticles(ULA(0.05)), "prior": Contrastive(P)},
    {"posterior": SuccessiveParticles(), "prior": Persistent(P, Underdamped(0.1))},
    {"posterior": WeightedParticles(), "prior": Persistent(P, weighted=True)},
    {"posterior": ShortRunParticles(Underdamped(0.1), num_moves=2), "prior": ShortRun(P, Underdamped(0.1), 2)},
]


@pytest.mark.parametrize("options", SYSTEMS, ids=repr)
def test_a_system_compiles_once_and_resumes_bit_for_bit(options):
    y = random.normal(random.key(0), (12,))
    ebipla = fitter(latent_energy, num_particles=N, num_samples=2, warmup=1, thinning=1, **options)
    run = lambda num, **kw: ebipla.run(random.key(1), y, batch_size=6, num_steps=num, progress_bar=False, **kw)
    whole = run(7)
    halves = run(4, init_state=run(3).state)
    compiled = next(iter(ebipla._systems.made.values())).run_chunk
    assert compiled._cache_size() == 1
    bare = lambda state: jax.tree.leaves(state._replace(rng_key=random.key_data(state.rng_key)))
    for a, b in zip(bare(whole.state), bare(halves.state), strict=True):
        assert np.array_equal(a, b, equal_nan=True)
    assert np.isfinite(whole.params["a"]) and whole.stopped is None


@pytest.mark.parametrize("posterior", POSTERIORS[-4:], ids=repr)
def test_without_latents_there_is_nothing_to_keep(posterior):
    """An ordinary energy-based model is the same whatever is said of particles that it has not; it used to fail."""
    first, second = (
        fitter(observed_energy, num_steps=3, prior=Persistent(P), posterior=how).run(
            random.key(0), np.ones(B), progress_bar=False
        )
        for how in (posterior, None)
    )
    assert first.params == second.params and first.get_samples() == {}
