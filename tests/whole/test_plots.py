"""What the pictures say, read back from their axes."""

import builtins
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_ebipla import EBIPLA, EnergyPrior, ModelError
from numpyro_ebipla._core.tree import spaced
from numpyro_ebipla.plots import (
    plot_energy,
    plot_generated,
    plot_history,
    plot_images,
    plot_interpolation,
    plot_pairs,
    plot_parameters,
    plot_reconstructions,
)

plt = pytest.importorskip("matplotlib.pyplot")
plt.switch_backend("Agg")

BASE = dist.Normal(0, 1).expand([2]).to_event(1)


@pytest.fixture(autouse=True)
def close():
    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()  # some of what Matplotlib refuses it refuses only here
    plt.close("all")


def recorded(num_steps=200, start=0, **more):
    """A fit as far as its history goes."""
    names = ["contrast", "grad_norm", "accept_local", "step_size_local", "x/accept", "x/log_z", "x/swap"]
    history = {name: 0.5 + 0.1 * np.sin(np.arange(num_steps)) for name in names} | more
    state = SimpleNamespace(step=np.int32(start + num_steps))
    return SimpleNamespace(history=history, losses=history["contrast"], state=state, stopped=None, arrived=False)


def visible(figure):
    return [ax for ax in figure.axes if ax.get_visible()]


@pytest.mark.unit
def test_history_has_a_panel_for_each_kind():
    figure = plot_history(recorded(start=100))
    axes = {ax.get_title(): ax for ax in visible(figure)}
    assert list(axes) == [
        "contrast",
        "gradient norm",
        "acceptance",
        "step size",
        "log normaliser",
        "swaps and brakes",
    ]
    assert all(ax.get_xlabel() == "step" and ax.get_ylabel() for ax in axes.values())
    assert axes["gradient norm"].get_yscale() == axes["step size"].get_yscale() == "log"
    labels = [text.get_text() for text in axes["acceptance"].get_legend().get_texts()]
    assert labels == ["particles, local latents", "prior walkers of x"]
    steps = axes["contrast"].lines[0].get_xdata()
    assert (steps[0], steps[-1]) == (101, 300)


@pytest.mark.unit
def test_lines_upon_each_other_are_seen():
    figure = plot_history(recorded(**{"brake": np.ones(200), "trust": np.ones(200)}))
    lines = [line for line in visible(figure)[-1].lines if not line.get_label().startswith("_")]
    widths = [line.get_linewidth() for line in lines]
    assert len(widths) == 3 and np.all(np.diff(widths) < 0)  # as they are drawn one after another


@pytest.mark.unit
@pytest.mark.parametrize("sign", [1, -1])
def test_first_steps_do_not_flatten_the_rest(sign):
    values = sign * np.concatenate([[1000.0] * 3, np.linspace(9, 1, 197)])
    ax = visible(plot_history(recorded(contrast=values)))[0]
    low, high = ax.get_ylim()
    assert low < values[20:].min() and values[20:].max() < high and high - low < 10
    assert ax.texts[0].get_text() == f"first steps reach {sign * 1000:.3g}"


@pytest.mark.unit
def test_an_even_history_is_shown_whole():
    ax = visible(plot_history(recorded(contrast=np.linspace(9, 1, 200))))[0]
    assert ax.get_ylim()[1] > 9 and not ax.texts


@pytest.mark.unit
def test_history_smooths_without_shifting():
    figure = plot_history(recorded(contrast=np.arange(200.0)), smooth=5)
    faint, mean = visible(figure)[0].lines
    np.testing.assert_array_equal(faint.get_ydata(), np.arange(200.0))
    # the mean over steps k-4 ... k, drawn at k
    assert (mean.get_xdata()[0], mean.get_ydata()[0]) == (5, 2.0)
    assert (mean.get_xdata()[-1], mean.get_ydata()[-1]) == (200, 197.0)


def test_history_of_short_and_stopped_fits():
    fit = recorded(num_steps=1)
    fit.stopped = "diverged"
    assert plot_history(fit).axes[0].get_title() == "contrast (stopped early)"
    plot_history(recorded(**{"x/log_z": np.full(200, np.nan)}))
    with pytest.raises(ValueError, match="no steps"):
        plot_history(recorded(num_steps=0))
    with pytest.raises(ValueError, match="as many axes"):
        plot_history(recorded(), axes=[plt.subplots()[1]])


@pytest.mark.unit
def test_generated_points_share_their_scales():
    data, draws = np.zeros((50, 3)), 2.0 * np.ones((5000, 3))
    left, right = plot_generated(data, draws, components=(0, 2)).axes
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
    assert left.get_ylabel() == "coordinate 2"
    assert len(right.collections[0].get_offsets()) == 2000


@pytest.mark.unit
def test_generated_images_keep_their_pixels():
    images = np.random.default_rng(0).uniform(size=(4, 2, 3))
    left, right = plot_generated(images, images[:3], image_shape=(2, 3), vmin=0, vmax=1).axes
    grid = left.images[0].get_array()
    assert grid.shape == (2 * 3 - 1, 2 * 4 - 1)
    np.testing.assert_allclose(grid[:2, :3], images[0])
    np.testing.assert_allclose(grid[3:, 4:], images[3])
    assert (right.images[0].get_array()[3:, 4:] == 1).all()
    plot_generated(np.zeros((2, 12)), np.zeros((2, 12)), image_shape=(2, 2, 3))


@pytest.mark.unit
def test_generated_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="2 coordinates, generated draws 3"):
        plot_generated(np.zeros((2, 2)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="image_shape"):
        plot_generated(np.zeros((2, 5)), np.zeros((2, 5)), image_shape=(2, 2))
    with pytest.raises(ValueError, match="components"):
        plot_generated(np.zeros((2, 1)), np.zeros((2, 1)))


@pytest.mark.unit
def test_images_and_reconstructions_keep_their_pixels():
    images = np.random.default_rng(0).uniform(size=(5, 2, 3, 1))
    grid = plot_images(images, columns=3, vmin=0, vmax=1).images[0].get_array()
    assert grid.shape == (2 * 3 - 1, 3 * 4 - 1)
    np.testing.assert_allclose(grid[3:, 4:7], images[4, ..., 0])
    grid = plot_reconstructions(images, images / 2, columns=4, vmin=0, vmax=1).images[0].get_array()
    np.testing.assert_allclose(grid[:2, 8:11], images[1, ..., 0])
    np.testing.assert_allclose(grid[:2, 12:], images[1, ..., 0] / 2)
    coloured = plot_images(np.ones((4, 12)), image_shape=(2, 2, 3)).images[0].get_array()
    assert coloured.shape == (5, 5, 3)


@pytest.mark.unit
def test_images_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"must have shape \[n, height, width\].*got \(5, 12\)"):
        plot_images(np.zeros((5, 12)))
    with pytest.raises(ValueError, match="does not hold 12 values"):
        plot_images(np.zeros((5, 12)), image_shape=(3, 3))
    with pytest.raises(ValueError, match="those of the same data"):
        plot_reconstructions(np.zeros((5, 2, 2)), np.zeros((4, 2, 2)))


@pytest.mark.parametrize("batch_size", [None, 4])
def test_interpolations_are_the_generators_values_between_two_particles(batch_size):
    """y = exp(x) outer a ramp, so that the images between are geometric means."""

    def model(y, batch_size=None):
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            x = numpyro.sample("x", dist.Normal(numpyro.param("mean", 0.0), 1))
            image = jnp.exp(x)[:, None, None] * jnp.arange(1.0, 7.0).reshape(2, 3)
            numpyro.deterministic("image", image)
            numpyro.sample("y", dist.Normal(image, 0.1).to_event(2), obs=numpyro.subsample(y, event_dim=2))

    y = np.exp(np.random.default_rng(0).normal(size=(9, 1, 1))) * np.arange(1.0, 7.0).reshape(2, 3)
    fit = EBIPLA(model, num_particles=4, num_samples=0).run(
        random.key(0), y, num_steps=20, batch_size=batch_size, progress_bar=False
    )
    x = np.asarray(fit.state.posterior.local["x"])[0]
    between = np.exp(np.linspace(x[7], x[2], 5))[:, None, None] * np.arange(1.0, 7.0).reshape(2, 3)
    for site in (None, "image"):
        np.testing.assert_allclose(fit.interpolate(7, 2, 5, site=site), between, rtol=1e-5)
    np.testing.assert_allclose(fit.interpolate(7, 2, 5, site="x"), np.linspace(x[7], x[2], 5), rtol=1e-5)
    grid = plot_interpolation(fit, [(7, 2), (0, 8)], num=5, vmin=0, vmax=10).images[0].get_array()
    assert grid.shape == (5, 19)
    np.testing.assert_allclose(grid[:2, 4:7], np.clip(between[1] / 10, 0, 1), rtol=1e-5)
    for call, words in (
        (lambda: fit.interpolate(0, 9), "indices must be integers from 0 to 8"),
        (lambda: fit.interpolate(0, 1, site="z"), "site must be one of .*, got 'z'"),
        (lambda: fit.interpolate(0, 1, particle=4), "the particle one of 4"),
    ):
        with pytest.raises(ModelError, match=words):
            call()


@pytest.mark.unit
def test_landscape_is_the_log_density():
    prior = EnergyPrior(lambda x: 3.0 * (x[..., 0] - 1.0) ** 2, BASE)
    walkers, particles = np.zeros((7, 2)), np.ones((4, 5, 2))
    ax = plot_energy(prior, walkers=walkers, particles=particles, limits=(-2, 2, -1, 1), resolution=41)
    assert (ax.get_xlim(), ax.get_ylim()) == ((-2, 2), (-1, 1))
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["prior walkers (7)", "posterior particles (20)"]
    # The mode of -3 (x - 1)² - x²/2 is at 6/7.
    top = max((c for c in ax.collections if hasattr(c, "levels")), key=lambda c: c.zorder)
    paths = [path for path in top.get_paths() if len(path.vertices)]
    highest = paths[-1].vertices
    np.testing.assert_allclose(highest[:, 0].mean(), 6 / 7, atol=0.1)


@pytest.mark.unit
def test_landscape_refuses_other_dimensions():
    prior = EnergyPrior(lambda x: jnp.sum(x**2, -1), dist.Normal(0, 1).expand([3]).to_event(1))
    with pytest.raises(ValueError, match=r"event shape \(3,\)"):
        plot_energy(prior, walkers=False)


@pytest.mark.unit
def test_without_matplotlib(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install numpyro_ebipla\[plots\]"):
        plot_history(recorded())


def test_an_energy_of_data_is_drawn_with_the_data():
    """More of it than a picture shows."""
    y = np.random.default_rng(0).normal(size=(3000, 2)).astype(np.float32)

    def model(y):
        a = numpyro.param("a", 1.0)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", EnergyPrior(lambda y: 0.5 * a * jnp.sum(y**2, -1), BASE), obs=y)

    fit = EBIPLA(model).run(random.key(0), y, num_steps=2, progress_bar=False)
    walkers, data = plot_energy(fit, resolution=10).collections[-2:]
    assert walkers.get_zorder() > data.get_zorder()
    assert walkers.get_label().startswith("prior walkers") and data.get_label() == "data (2000)"
    shown = np.asarray(data.get_offsets(), np.float32)
    assert {tuple(row) for row in shown} <= {tuple(row) for row in y}


def mixed(y):
    mean, s = numpyro.param("mean", jnp.zeros(2)), numpyro.param("s", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, s).to_event(1))
        numpyro.sample("y", dist.Normal(x, 1).to_event(1), obs=y)


def test_parameters_are_followed_in_their_own_space():
    """Lines are the path, dashes the estimates, bands their intervals: all that the axes show is the table's."""
    y = np.random.default_rng(0).normal([3, -1], 1.5, (100, 2)).astype(np.float32)
    fit = EBIPLA(mixed).run(random.key(0), y, num_steps=900, progress_bar=False)
    assert fit.history["params"].shape == (len(fit.losses), 3)
    one, other = visible(plot_parameters(fit))
    assert (one.get_title(), other.get_title()) == ("mean", "s")
    table = fit.summary()
    rows = dict(zip(table.names, zip(table.estimate, table.lower, table.upper, strict=True), strict=True))
    for ax, names in ((one, ["mean[0]", "mean[1]"]), (other, ["s"])):
        paths, dashes = ax.lines[::2], ax.lines[1::2]
        for path, dash, band, name in zip(paths, dashes, ax.patches, names, strict=True):
            estimate, lower, upper = rows[name]
            np.testing.assert_allclose(dash.get_ydata(), estimate, rtol=1e-5)
            bottom, top = band.get_extents().transformed(ax.transData.inverted()).intervaly
            np.testing.assert_allclose([bottom, top], [lower, upper], rtol=1e-4)
            assert lower < path.get_ydata()[-1] < upper
            assert ax.get_ylim()[0] <= lower and upper <= ax.get_ylim()[1]
    last = other.lines[0].get_ydata()[-1]
    np.testing.assert_allclose(last, fit.config.model.constrain_params(fit.state.params)["s"], rtol=1e-5)
    only = visible(plot_parameters(fit, names=["s"], prob=None))
    assert [ax.get_title() for ax in only] == ["s"] and not only[0].patches
    for wrong, more in ((dict(names=["t"]), "names must be among"), (dict(axes=[plt.subplots()[1]]), "need as many")):
        with pytest.raises(ValueError, match=more):
            plot_parameters(fit, **wrong)
    with pytest.raises(ValueError, match="no path was kept"):
        plot_parameters(recorded())


def test_pairs_of_a_prior_of_three_dimensions():
    """Each panel below the diagonal has the walkers' and the particles' own coordinates."""

    def model(y):
        a = numpyro.param("a", 0.1)
        with numpyro.plate("data", len(y)):
            base = dist.Normal(0, 1).expand([3]).to_event(1)
            x = numpyro.sample("x", EnergyPrior(lambda x: a * jnp.sum(x**2, -1), base))
            numpyro.sample("y", dist.Normal(x, 1).to_event(1), obs=y)

    y = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    fit = EBIPLA(model, num_samples=5).run(random.key(0), y, num_steps=20, progress_bar=False)
    figure = plot_pairs(fit)
    assert len(figure.axes) == 9 and len(visible(figure)) == 6
    walkers = fit.prior_samples()["x"].reshape(-1, 3)
    ax = figure.axes[7]  # the last row, the second column
    assert (ax.get_xlabel(), figure.axes[6].get_ylabel()) == ("coordinate 1", "coordinate 2")
    shown = ax.collections[1].get_offsets()  # on top of the particles, which are more
    np.testing.assert_allclose(shown, walkers[spaced(len(walkers), 2000)][:, [1, 2]], rtol=1e-6)
    some = plot_pairs(fit, components=[2, 0], particles=np.zeros((7, 3)))
    assert some.axes[2].get_xlabel() == "coordinate 2"
    assert some.axes[2].collections[1].get_offsets().shape == (7, 2)
    with pytest.raises(ValueError, match="components must be among the 3"):
        plot_pairs(fit, components=[3])
    with pytest.raises(ValueError, match="axes must be"):
        plot_pairs(fit, axes=[plt.subplots()[1]])
