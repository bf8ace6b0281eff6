"""What a fit shows of itself: samples, ArviZ groups on both lines, and the summary."""

import builtins

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import Predictive

from numpyro_ebipla import EBIPLA, Annealed, EnergyPrior, Persistent, Tempered

az = pytest.importorskip("arviz")
OLD = az.__version__.startswith("0.")

X = np.linspace(-1, 1, 21).reshape(7, 3).astype(np.float32)
Y = np.random.default_rng(3).normal(size=(7, 2)).astype(np.float32)
BASE = dist.Normal(0, 1).expand([2]).to_event(1)


def groups(tree):
    return set(tree.groups()) if OLD else {name.strip("/") for name in tree.groups if name != "/"}


def everything(y, x, batch_size=None):
    """A global positive latent, an energy prior in a subsampled plate, a deterministic site and a factor."""
    p = numpyro.param("p", 1.0, constraint=dist.constraints.positive)
    scale = numpyro.sample("scale", dist.LogNormal(0, 0.5))
    with numpyro.plate("items", len(y), subsample_size=batch_size) as i:
        z = numpyro.sample("z", EnergyPrior(lambda z: 0.5 * p * jnp.sum(z**2, -1), BASE))
        mean = numpyro.deterministic("mean", z + x[i, :2])
        numpyro.factor("nothing", 0.0 * mean[:, 0])
        numpyro.sample("y", dist.Normal(mean, scale).to_event(1), obs=y[i])


def plain(y):
    """Normal-normal, the plate not subsampled."""
    m = numpyro.param("m", 0.5)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(m, 1))
        numpyro.deterministic("double", 2 * x)
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


def ebm(y):
    p = numpyro.param("p", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", EnergyPrior(lambda y: 0.5 * p * jnp.sum(y**2, -1), BASE), obs=y)


@pytest.fixture(scope="module")
def full():
    prior = Persistent(num_walkers=64)
    ebipla = EBIPLA(everything, num_particles=4, num_steps=20, num_samples=12, warmup=10, thinning=1, prior=prior)
    kwargs = {"x": X, "batch_size": 3, "progress_bar": False, "sites": ["z", "scale", "mean"]}
    return ebipla.run(random.key(0), Y, **kwargs)


@pytest.fixture(scope="module")
def tree(full):
    """All groups of it."""
    return full.to_arviz(log_likelihood=True, posterior_predictive=True)


@pytest.fixture(scope="module")
def part():
    """Only data 4 and 1 collected, of a plate that is not subsampled."""
    ebipla = EBIPLA(plain, num_particles=3, num_samples=8, warmup=5, thinning=1)
    return ebipla.run(random.key(0), Y[:, 0], num_steps=0, progress_bar=False, indices=[4, 1], sites=["x", "double"])


@pytest.fixture(scope="module")
def visible():
    ebipla = EBIPLA(ebm, num_steps=10, prior=Tempered(num_walkers=500, num_rungs=3))
    return ebipla.run(random.key(0), Y, progress_bar=False)


# --- samples --------------------------------------------------------------------------------------------


def test_samples_are_grouped_by_default_and_constrained(full):
    samples = full.get_samples()
    assert {k: v.shape for k, v in samples.items()} == {
        "z": (4, 12, 7, 2),
        "scale": (4, 12),
        "mean": (4, 12, 7, 2),
    }
    assert (samples["scale"] > 0).all()
    np.testing.assert_allclose(samples["mean"], samples["z"] + X[:, :2], rtol=1e-5, atol=1e-6)
    flat = full.get_samples(group_by_chain=False)
    np.testing.assert_array_equal(flat["z"], samples["z"].reshape(48, 7, 2))


def test_a_fit_is_frozen_and_says_what_it_is(full):
    assert repr(full) == "Fit(20 steps, 4 particles, 12 draws each of 'z', 'scale', 'mean')"
    assert full.losses.shape == (20,)
    assert set(full.params) == {"p"}
    with pytest.raises(AttributeError):
        full.params = {}


def test_the_fitted_model_visits_all_data_in_order(full):
    flat = full.get_samples(group_by_chain=False)
    latents = {name: flat[name] for name in ("z", "scale")}
    out = Predictive(full.model, posterior_samples=latents, return_sites=["mean"])(random.key(0), Y, x=X, batch_size=3)
    np.testing.assert_allclose(out["mean"], flat["mean"], rtol=1e-5, atol=1e-6)


def test_the_fitted_prior_is_that_of_the_fitted_parameters(full):
    prior = full.energy_prior()
    x = jnp.ones(2)
    np.testing.assert_allclose(prior.log_prob(x), BASE.log_prob(x) - full.params["p"], rtol=1e-5)
    with pytest.raises(ValueError, match="energy priors"):
        full.energy_prior("w")


# --- to_arviz -------------------------------------------------------------------------------------------


def test_groups_and_dims(full, tree):
    assert groups(tree) == {
        "posterior",
        "sample_stats",
        "prior",
        "observed_data",
        "constant_data",
        "log_likelihood",
        "posterior_predictive",
    }
    samples = full.get_samples()
    for name in samples:
        np.testing.assert_array_equal(tree["posterior"][name].values, samples[name])
    assert tree["posterior"]["z"].dims == ("chain", "draw", "items", "z_dim_0")
    assert tree["posterior"]["scale"].dims == ("chain", "draw")
    assert tree["posterior"]["mean"].dims == ("chain", "draw", "items", "mean_dim_0")
    assert tree["prior"]["z"].dims == ("chain", "draw", "z_dim_0")
    assert list(tree["observed_data"].data_vars) == ["y"]
    np.testing.assert_array_equal(tree["observed_data"]["y"].values, Y)
    assert tree["observed_data"]["y"].dims == ("items", "y_dim_0")
    assert list(tree["constant_data"].data_vars) == ["x"]
    np.testing.assert_array_equal(tree["constant_data"]["x"].values, X)
    assert tree["constant_data"]["x"].dims == ("x_dim_0", "x_dim_1")
    assert tree["posterior_predictive"]["y"].sizes == {"chain": 4, "draw": 12, "items": 7, "y_dim_0": 2}
    assert tree["sample_stats"]["lp"].dims == ("chain", "draw")
    for name in ("acceptance_rate_local", "acceptance_rate_global"):
        assert ((tree["sample_stats"][name] >= 0) & (tree["sample_stats"][name] <= 1)).all()


def test_log_likelihood_and_density_are_those_of_the_model(full, tree):
    samples = full.get_samples()
    scale = samples["scale"][..., None, None]
    expected = dist.Normal(samples["mean"], scale).to_event(1).log_prob(Y)
    assert list(tree["log_likelihood"].data_vars) == ["y"]
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "items")
    np.testing.assert_allclose(tree["log_likelihood"]["y"].values, expected, rtol=1e-4, atol=1e-4)
    prior = BASE.log_prob(samples["z"]) - 0.5 * full.params["p"] * np.sum(samples["z"] ** 2, -1)
    # Densities are those of the unconstrained latents.
    hyper = dist.Normal(0, 0.5).log_prob(np.log(samples["scale"]))
    lp = (expected + prior).sum(-1) + hyper
    np.testing.assert_allclose(tree["sample_stats"]["lp"].values, lp, rtol=1e-4, atol=1e-3)


def test_predictive_draws_follow_each_draw(full, tree):
    samples = full.get_samples()
    standard = (tree["posterior_predictive"]["y"].values - samples["mean"]) / samples["scale"][..., None, None]
    assert abs(standard.mean()) < 0.15
    assert abs(standard.std() - 1) < 0.1


def test_names_and_indices_reduce_all_groups(full, tree):
    labels, whole = [f"item {i}" for i in range(7)], tree
    tree = full.to_arviz("z", [5, 2], log_likelihood=True, coords={"items": labels}, dims={"x": ["items", "feature"]})
    assert list(tree["posterior"].data_vars) == ["z"]
    np.testing.assert_array_equal(tree["posterior"]["z"].values, full.get_samples()["z"][:, :, [5, 2]])
    np.testing.assert_array_equal(tree["observed_data"]["y"].values, Y[[5, 2]])
    np.testing.assert_array_equal(tree["constant_data"]["x"].values, X[[5, 2]])
    for group, name in (("posterior", "z"), ("observed_data", "y"), ("log_likelihood", "y")):
        assert list(tree[group][name].coords["items"].values) == ["item 5", "item 2"]
    expected = whole["log_likelihood"]["y"].values[..., [5, 2]]
    np.testing.assert_allclose(tree["log_likelihood"]["y"].values, expected, rtol=1e-5)


def test_partly_collected(part):
    samples = part.get_samples()
    assert samples["x"].shape == samples["double"].shape == (3, 8, 2)
    np.testing.assert_allclose(samples["double"], 2 * samples["x"])
    tree = part.to_arviz(log_likelihood=True)
    assert "prior" not in groups(tree)
    assert list(tree["posterior"].coords["data"].values) == [4, 1]
    np.testing.assert_array_equal(tree["observed_data"]["y"].values, Y[[4, 1], 0])
    expected = dist.Normal(samples["x"], 1).log_prob(Y[[4, 1], 0])
    np.testing.assert_allclose(tree["log_likelihood"]["y"].values, expected, rtol=1e-5)
    lp = expected + dist.Normal(part.params["m"], 1).log_prob(samples["x"])
    np.testing.assert_allclose(tree["sample_stats"]["lp"].values, lp, rtol=1e-4)
    assert tree["sample_stats"]["lp"].dims == ("chain", "draw", "data")
    one = part.to_arviz(indices=[1])
    np.testing.assert_array_equal(one["posterior"]["x"].values, samples["x"][..., [1]])


def test_clear_errors(full, part, visible):
    with pytest.raises(ValueError, match="'w' was not collected"):
        full.to_arviz(["w"])
    with pytest.raises(ValueError, match=r"data \[3\] were not collected"):
        part.to_arviz(indices=[3])
    with pytest.raises(ValueError, match="max_bytes"):
        full.to_arviz(posterior_predictive=True, prior=False, max_bytes=1000)
    with pytest.raises(ValueError, match="'x' has 2 axes"):
        full.to_arviz(prior=False, dims={"x": ["items"]})
    with pytest.raises(ValueError, match="no latents"):
        visible.to_arviz(posterior_predictive=True)
    with pytest.raises(ValueError, match="one for each datum"):
        full.to_arviz(indices=[1], prior=False, coords={"items": ["a"]})


def test_without_arviz(full, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "arviz":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install numpyro_ebipla\[arviz\]"):
        full.to_arviz()


def test_round_trip_through_netcdf(tree, tmp_path):
    pytest.importorskip("h5py")  # in the extra, but h5netcdf itself does not ask for it
    path = str(tmp_path / "fit.nc")
    tree.to_netcdf(path, engine="h5netcdf")
    back = az.from_netcdf(path, engine="h5netcdf")
    for group in groups(tree):
        for name in tree[group].data_vars:
            np.testing.assert_array_equal(back[group][name].values, tree[group][name].values)


# --- ArviZ itself ---------------------------------------------------------------------------------------


def test_from_numpyro_agrees(full, part):
    for fit, plate in ((full, "items"), (part, "data")):
        tree = az.from_numpyro(fit, log_likelihood=True)
        for name, value in fit.get_samples().items():
            np.testing.assert_array_equal(tree["posterior"][name].values, value)
        assert plate in tree["posterior"].dims
        ours = fit.to_arviz(log_likelihood=True, prior=False)
        theirs = tree["log_likelihood"]["y"].values
        if fit is part:  # the model cannot be told to visit two data only
            theirs = theirs[..., fit.plan.indices]
        np.testing.assert_allclose(theirs, ours["log_likelihood"]["y"].values, rtol=1e-4, atol=1e-4)
        lp = "lp"
        np.testing.assert_array_equal(tree["sample_stats"][lp].values, ours["sample_stats"][lp].values)
    np.testing.assert_array_equal(az.from_numpyro(full)["observed_data"]["y"].values, Y)


def test_diagnostics_agree_with_numpyro(full, tree):
    samples = full.get_samples()
    posterior = tree["posterior"] if OLD else tree["posterior"].dataset
    r_hat = az.rhat(posterior, method="split")
    for name, value in samples.items():
        np.testing.assert_allclose(r_hat[name].values, split_gelman_rubin(value), rtol=1e-3)
    ess = az.ess(posterior, method="mean")["z"].values
    ratio = ess / effective_sample_size(samples["z"])
    assert 0.5 < np.median(ratio) < 2
    assert len(az.summary(tree, var_names=["z"])) == 14


def test_trace_plot(full):
    plt = pytest.importorskip("matplotlib.pyplot")
    tree = full.to_arviz(["z"], [0], prior=False)
    (az.plot_trace if OLD else az.plot_trace_dist)(tree)
    plt.close("all")


# --- walkers and models without latents -----------------------------------------------------------------


def test_walkers_are_draws_of_the_fitted_prior(full, visible):
    walkers = full.prior_samples()["z"]
    assert walkers.shape == (64, 2)
    np.testing.assert_array_equal(walkers, full.prior_samples()["z"])
    walkers = visible.prior_samples()["y"]
    assert walkers.shape == (500, 2)
    np.testing.assert_allclose(walkers.var(), 1 / (1 + visible.params["p"]), rtol=0.15)


def test_model_without_latents(visible, capsys):
    tree = visible.to_arviz(log_likelihood=True)
    assert groups(tree) == {"prior", "observed_data", "log_likelihood"}
    normalised = dist.Normal(0, (1 + visible.params["p"]) ** -0.5).expand([2]).to_event(1).log_prob(Y)
    np.testing.assert_allclose(tree["log_likelihood"]["y"].values[0, 0], normalised, atol=0.1)
    assert tree["prior"]["y"].sizes == {"chain": 1, "draw": 500, "y_dim_0": 2}
    assert "observed_data" in groups(az.from_numpyro(visible))
    visible.print_summary(diagnostics=False)
    text = capsys.readouterr().out
    assert all(part in text for part in ("p = ", "y/log_z: ", "y/swap: "))


@pytest.mark.slow  # compiles an anneal three times
def test_walkers_of_a_conditional_prior():
    def model(y, c, batch_size):
        p = numpyro.param("p", 1.0)
        with numpyro.plate("data", len(y), subsample_size=batch_size) as i:
            energy = lambda x: 0.5 * (x - p * c[i]) ** 2 * 3.0
            x = numpyro.sample("x", EnergyPrior(energy, dist.Normal(0, 1).expand([len(i)])))
            numpyro.sample("y", dist.Normal(x, 1), obs=y[i])

    c = jnp.array([-4.0, 0.0, 4.0])
    ebipla = EBIPLA(model, num_particles=2, num_samples=4, prior=Annealed(num_walkers=200))
    fit = ebipla.run(random.key(0), Y[:3, 0], c, 2, num_steps=0, progress_bar=False)
    prior = fit.to_arviz(["x"])["prior"]["x"]
    assert prior.sizes == {"chain": 1, "draw": 200, "data": 3}
    # exp(-x²/2 - 3 (x - pc)²/2) is N(3 pc / 4, 1/4)
    np.testing.assert_allclose(prior.values[0].mean(0), 0.75 * fit.params["p"] * c, atol=0.2)
    some = fit.to_arviz(indices=[2])["prior"]["x"]
    assert list(some.coords["data"].values) == [2]
    np.testing.assert_allclose(some.values.mean(), 3.0 * fit.params["p"], atol=0.2)


# --- the summary ----------------------------------------------------------------------------------------


def test_summary(full, capsys):
    full.print_summary(indices=[5, 2], max_rows=3, diagnostics=False)
    text = capsys.readouterr().out
    assert "Fit(20 steps" in text and "p = " in text
    assert "z/accept: " in text and "accept_local: " in text
    visits = f"{20 * 3 / len(Y):.3g}"
    assert f"each datum's particles: {visits} visits so far, {visits} moves" in text
    assert "z[5,0]" in text and "z[2,1]" in text and "z[0," not in text
    assert "z: 3 of 4 scalars shown; over all 4: r_hat max" in text
    row = next(line for line in text.splitlines() if line.strip().startswith("scale "))
    numbers = [float(x) for x in row.split()[1:]]
    scale = full.get_samples()["scale"]
    np.testing.assert_allclose(numbers[0], scale.mean(), atol=0.006)
    np.testing.assert_allclose(numbers[-1], split_gelman_rubin(scale), atol=0.006)
    np.testing.assert_allclose(numbers[-2], effective_sample_size(scale), atol=0.006)


def test_summary_of_a_stopped_fit(part, capsys):
    from dataclasses import replace

    stopped = replace(part, stopped="the fit diverged at step 9")
    stopped.print_summary(["x"], diagnostics=False)
    text = capsys.readouterr().out
    assert "stopped early" in text and "stopped: the fit diverged at step 9" in text
    assert "double" not in text.split("parameters")[1]
