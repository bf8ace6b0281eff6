"""Pictures of a fit, with Matplotlib: its history, generated data, images, and a two-dimensional energy landscape."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebipla._core.tree import spaced
from numpyro_ebipla.image_plots import plot_images, plot_interpolation, plot_reconstructions, pyplot, tiles
from numpyro_ebipla.model.energy import EnergyPrior
from numpyro_ebipla.results.sites import trace_sites

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from numpyro_ebipla.results.fit import Fit

__all__ = [
    "plot_energy",
    "plot_generated",
    "plot_history",
    "plot_images",
    "plot_interpolation",
    "plot_reconstructions",
]

#: Points of a scatter plot, at most.
MAX_POINTS = 2000
#: Nats below its mode at which a landscape's colours end.
DEPTH = 12.0

#: Share of the steps whose values may leave the axis, where they would leave less than a third of it to the others.
FIRST_STEPS = 0.1

#: Panels of the history: title, label of the axis, log scale, which entries.
_PANELS: list[tuple[str, str, bool, Callable[[str], bool]]] = [
    ("contrast", "nats per datum", False, lambda name: name == "contrast"),
    ("gradient norm", "‖∇θ‖", True, lambda name: name == "grad_norm"),
    ("acceptance", "probability", False, lambda name: name.startswith("accept") or name.endswith("/accept")),
    ("step size", "step size h", True, lambda name: name.startswith("step_size")),
    ("log normaliser", "log Z against the base", False, lambda name: name.endswith("/log_z")),
    ("effective sample size", "ESS / P", False, lambda name: name.endswith("/ess")),
    ("swaps and brakes", "fraction", False, lambda name: name.rpartition("/")[2] in ("swap", "brake", "trust")),
]
_LABELS = {
    "ess": "lowest of the walkers",
    "swap": "rarest swap of neighbours",
    "brake": "energy's rate (1: no brake)",
    "trust": "energy's rate (1: in the trust region)",
}


def plot_history(fit: "Fit", axes: Sequence["Axes"] | None = None, *, smooth: int | None = None) -> Any:
    """Plot the history of a fit, one panel for each kind of number that it has.

    Panels are the contrast, the gradient's norm, acceptance of all moves, step sizes, and of the prior walkers log Z,
    the effective sample size over the number of walkers (above 1 where those of other temperatures count), the share
    of swaps between the neighbouring temperatures that swap least, and how far the energy's rate is reduced. Faint
    lines are single steps, full lines running means. Where the first tenth of the steps would leave less than a third
    of the axis to the others it runs out of the picture, and a line says to where.

    Args:
        fit: of :meth:`.EBIPLA.run`.
        axes: at least as many as there are panels (at most seven), by default those of a new figure.
        smooth: steps of the running mean, by default a fiftieth of all.

    Returns:
        The figure.

    Raises:
        ImportError: without Matplotlib.
        ValueError: if the fit took no steps, or there are too few axes.
    """
    plt, history = pyplot(), fit.history
    num_steps = len(fit.losses)
    if not num_steps:
        raise ValueError("plot_history: the fit took no steps, so there is no history.")
    panels = [(*panel[:3], [k for k in history if panel[3](k)]) for panel in _PANELS]
    panels = [panel for panel in panels if panel[3]]
    if axes is None:
        columns = next((n for n in (3, 2) if len(panels) % n == 0), 4)
        rows = -(-len(panels) // columns)
        _, grid = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained", squeeze=False)
        axes = list(grid.flat)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
    axes = list(np.ravel(np.asarray(axes, dtype=object)))
    if len(axes) < len(panels):
        raise ValueError(f"plot_history: {len(panels)} panels need as many axes, got {len(axes)}.")
    window = max(1, num_steps // 50) if smooth is None else smooth
    steps = int(fit.state.step) - num_steps + 1 + np.arange(num_steps)
    for ax, (title, label, log, names) in zip(axes, panels, strict=False):
        for i, name in enumerate(names):
            # Each narrower than the one before: those that stay at 1 lie upon each other.
            _line(ax, steps, history[name], window, _label(name), width=0.5 + len(names) - i)
        if log:
            ax.set_yscale("log")
        elif label in ("probability", "fraction"):
            ax.set_ylim(-0.03, 1.03)
        else:
            _cut_first_steps(ax, np.stack([history[name] for name in names]))
        ax.set(title=title, xlabel="step", ylabel=label)
        if len(names) > 1 or "/" in names[0]:
            ax.legend(fontsize="small")
    if fit.stopped and not fit.arrived:
        axes[0].set_title(f"{panels[0][0]} (stopped early)")
    return axes[0].figure


def plot_generated(
    data: Any,
    generated: Any,
    axes: Sequence["Axes"] | None = None,
    *,
    image_shape: tuple[int, ...] | None = None,
    components: tuple[int, int] = (0, 1),
    num_images: int = 36,
    vmin: float | None = None,
    vmax: float | None = None,
) -> Any:
    """Plot data beside generated draws: two coordinates as points, or grids of images, on equal scales.

    Args:
        data: ``[M, ...]``; everything after the first axis is flattened.
        generated: ``[G, ...]`` likewise.
        axes: two, by default those of a new figure.
        image_shape: ``(height, width)`` or ``(height, width, 3)`` to draw images.
        components: which two of the flattened coordinates to draw, if no images.
        num_images: of each grid, at most.
        vmin: value drawn black, by default the least of the data.
        vmax: value drawn white, by default the greatest of the data.

    Returns:
        The figure.

    Raises:
        ImportError: without Matplotlib.
        ValueError: if the shapes do not fit.

    >>> import numpy as np
    >>> figure = plot_generated(np.zeros((5, 2)), np.ones((9, 2)))
    >>> [ax.get_title() for ax in figure.axes]
    ['data', 'generated']
    """
    plt = pyplot()
    both = [np.asarray(x, dtype=float).reshape(len(x), -1) for x in (data, generated)]
    if both[0].shape[1] != both[1].shape[1]:
        raise ValueError(f"data have {both[0].shape[1]} coordinates, generated draws {both[1].shape[1]}.")
    if image_shape is not None and np.prod(image_shape) != both[0].shape[1]:
        raise ValueError(f"image_shape {image_shape} does not hold {both[0].shape[1]} values.")
    if image_shape is None and not max(components) < both[0].shape[1]:
        raise ValueError(f"components {components} of data with {both[0].shape[1]} coordinates: choose others.")
    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    low = both[0].min() if vmin is None else vmin
    high = both[0].max() if vmax is None else vmax
    for ax, title, x in zip(axes, ("data", "generated"), both, strict=True):
        ax.set_title(title)
        if image_shape is not None:
            ax.imshow(_grid(x[spaced(len(x), num_images)], image_shape, low, high), cmap="gray", vmin=0, vmax=1)
            ax.set_axis_off()
            continue
        shown = x[spaced(len(x), MAX_POINTS)]
        ax.scatter(*shown[:, components].T, s=5, alpha=0.5, linewidths=0)
        ax.set(xlabel=f"coordinate {components[0]}", ylabel=f"coordinate {components[1]}")
        ax.set_aspect("equal", adjustable="box")
    if image_shape is None:
        axes[1].sharex(axes[0])
        axes[1].sharey(axes[0])
        _frame(axes[0], np.concatenate([x[:, components] for x in both]))
    return axes[0].figure


def plot_energy(
    fit: "Fit | EnergyPrior",
    ax: "Axes | None" = None,
    *,
    site: str | None = None,
    walkers: Any = None,
    particles: Any = None,
    limits: tuple[float, float, float, float] | None = None,
    resolution: int = 150,
) -> "Axes":
    """Plot the landscape of a two-dimensional prior, with its walkers and the posterior particles or the data on it.

    Colours are the log density in nats below its highest value (its level is unknown without log Z). Where
    the fit is good, walkers (draws of the prior) and particles (draws of the posteriors of all data; of an energy
    of observed data, the data) have one distribution.

    Args:
        fit: a fit, or an :class:`.EnergyPrior`.
        ax: where to draw, by default a new figure.
        site: which energy prior of the fit, if there are several.
        walkers: ``[P, 2]`` to show instead of the fit's own; False shows none.
        particles: ``[n, 2]`` likewise; by default the last draw of every particle, or the data that the prior is of.
        limits: ``(left, right, bottom, top)``, by default what is shown and a margin.
        resolution: grid points along each axis.

    Raises:
        ImportError: without Matplotlib.
        ValueError: if the prior is not two-dimensional, or is conditional on covariates.

    >>> import numpyro.distributions as dist
    >>> prior = EnergyPrior(lambda x: jnp.sum(x**4, -1), dist.Normal(0, 1).expand([2]).to_event(1))
    >>> ax = plot_energy(prior, walkers=False, resolution=20)
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('coordinate 0', 'coordinate 1')
    """
    plt, others = pyplot(), "posterior particles"
    if isinstance(fit, EnergyPrior):
        prior, name = fit, site or "x"
        walkers = np.asarray(prior.sample(jax.random.key(0), (500,))) if walkers is None else walkers
    else:
        name = fit.energy_site(site)
        prior = fit.energy_prior(name)
        _check_two_dimensional(prior, name)
        walkers = fit.prior_samples()[name] if walkers is None else walkers
        if particles is None and name in fit.get_samples():
            particles = fit.get_samples()[name][:, -1]
        elif particles is None and fit.config.model.energies[name].observed:
            others = "data"
            particles = trace_sites(fit, spaced(fit.config.model.num_data, MAX_POINTS), {})[1][name].values
    _check_two_dimensional(prior, name)
    clouds = [
        ("prior walkers", walkers, "red"),
        (others, particles, "white"),
    ]
    shown = [(label, _cloud(x), colour) for label, x, colour in clouds if x is not None and x is not False]
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 5), layout="constrained")
    if limits is None:
        limits = _limits(np.concatenate([x for _, x, _ in shown])) if shown else (-4.0, 4.0, -4.0, 4.0)
    x, y = np.linspace(*limits[:2], resolution), np.linspace(*limits[2:], resolution)
    grid = jnp.asarray(np.stack(np.meshgrid(x, y), -1).reshape(-1, 2), jnp.result_type(float))
    value = np.asarray(jax.jit(prior.log_prob)(grid)).reshape(resolution, resolution)
    value = np.where(np.isfinite(value), value, -np.inf)
    value = np.maximum(value - value.max(), -DEPTH)
    filled = ax.contourf(x, y, value, levels=np.linspace(-DEPTH, 0, 25), cmap="viridis", extend="min")
    ax.figure.colorbar(filled, ax=ax, label="log density below its mode (nats)", ticks=np.arange(-DEPTH, 1, 2))
    for label, points, colour in shown:
        points = points[spaced(len(points), MAX_POINTS)]
        edge = "black" if colour == "white" else "none"
        ax.scatter(
            points[:, 0],
            points[:, 1],
            s=9,
            c=colour,
            edgecolors=edge,
            linewidths=0.3,
            zorder=2 - len(points) / (2 * MAX_POINTS),  # few on top of many; the landscape has 1
            label=f"{label} ({len(points)})",
        )
    ax.set(xlim=limits[:2], ylim=limits[2:], title=f"fitted prior of {name}")
    ax.set(xlabel="coordinate 0", ylabel="coordinate 1")
    if shown:
        ax.legend(fontsize="small", facecolor="lightgrey", framealpha=0.9)
    return ax


# --- parts ----------------------------------------------------------------------------------------------


def _line(ax: "Axes", steps: np.ndarray, values: np.ndarray, window: int, label: str, width: float) -> None:
    """Plot single steps faintly, and their running mean."""
    values = np.where(np.isfinite(values), values, np.nan)
    if window == 1 or np.isnan(values).any():
        ax.plot(steps, values, label=label, lw=width, marker="." if len(values) == 1 else "")
        return
    (faint,) = ax.plot(steps, values, alpha=0.25, lw=0.7)
    total = np.cumsum(np.insert(values.astype(float), 0, 0.0))
    mean = (total[window:] - total[:-window]) / window
    ax.plot(steps[window - 1 :], mean, color=faint.get_color(), label=label, lw=width)


def _cut_first_steps(ax: "Axes", values: np.ndarray) -> None:
    """Let the axis end near the values ``[lines, K]`` of the later steps, if the first ones would flatten them."""
    early, later = np.split(values, [int(FIRST_STEPS * values.shape[1])], axis=1)
    early, later = early[np.isfinite(early)], later[np.isfinite(later)]
    if not (early.size and later.size):
        return
    low, high = later.min(), later.max()
    least, most = min(low, early.min()), max(high, early.max())
    if not 0 < 3 * (high - low) < most - least:
        return
    margin = 0.08 * (high - low)
    ax.set_ylim(low - margin, high + margin)
    reach = most if most - high > low - least else least
    ax.text(
        0.5, 0.97, f"first steps reach {reach:.3g}", transform=ax.transAxes, ha="center", va="top", fontsize="small"
    )


def _label(name: str) -> str:
    """Return an entry's name as a reader would say it."""
    site, _, what = name.rpartition("/")
    if what in ("brake", "trust"):  # of all energies together
        return _LABELS[what]
    if site:
        return f"{site}: {_LABELS[what]}" if what in _LABELS else f"prior walkers of {site}"
    kind = {"local": "particles, local latents", "global": "particles, global latents"}
    return kind.get(name.rpartition("_")[2], name)


def _check_two_dimensional(prior: EnergyPrior, name: str) -> None:
    if prior.batch_shape or prior.event_shape != (2,):
        raise ValueError(
            f"plot_energy draws priors with event shape (2,) and no batch shape; '{name}' has event shape "
            f"{prior.event_shape} and batch shape {prior.batch_shape}."
        )


def _cloud(x: Any) -> np.ndarray:
    """Return points ``[n, 2]`` of any number of axes before the last."""
    x = np.asarray(x, dtype=float)
    if x.shape[-1] != 2:
        raise ValueError(f"walkers and particles must have shape [..., 2], got {x.shape}.")
    return x.reshape(-1, 2)


def _limits(points: np.ndarray) -> tuple[float, float, float, float]:
    """Return where the bulk of the points is, with a margin of a fifth."""
    low, high = np.quantile(points, [0.002, 0.998], axis=0)
    margin = 0.2 * np.maximum(high - low, 1e-3)
    (left, bottom), (right, top) = low - margin, high + margin
    return float(left), float(right), float(bottom), float(top)


def _frame(ax: "Axes", points: np.ndarray) -> None:
    left, right, bottom, top = _limits(points)
    ax.set(xlim=(left, right), ylim=(bottom, top))


def _grid(x: np.ndarray, image_shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
    return tiles(x.reshape(-1, *image_shape), int(np.ceil(np.sqrt(len(x)))), low, high)
