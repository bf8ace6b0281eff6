"""Pictures of a fit, with Matplotlib: its history and parameters, generated data, priors, images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebipla._core.tree import spaced
from numpyro_ebipla.history_plots import plot_history, plot_parameters
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
    "plot_pairs",
    "plot_parameters",
    "plot_reconstructions",
]

#: Points of a scatter plot, at most.
MAX_POINTS = 2000
#: Coordinates that are paired, if none are chosen, at most.
MOST_PAIRED = 5
#: Nats below its mode at which a landscape's colours end.
DEPTH = 12.0


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
        if particles is None:
            others, particles = _particles_or_data(fit, name)
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


def plot_pairs(
    fit: "Fit",
    axes: Any = None,
    *,
    site: str | None = None,
    components: Sequence[int] | None = None,
    walkers: Any = None,
    particles: Any = None,
) -> Any:
    """Plot the walkers and particles of an energy prior, of any dimension, in pairs of coordinates.

    Walkers are draws of the prior, particles of the posteriors of all data (of an energy of observed data, the data
    themselves): where the fit is good, both have one distribution. On the diagonal are histograms of equal area.

    Args:
        fit: a fit with an energy prior.
        axes: ``[c, c]``, by default those of a new figure.
        site: which energy prior of the fit, if there are several.
        components: which c of the flattened coordinates to plot, by default the first five.
        walkers: ``[P, ...]`` to show instead of the fit's own.
        particles: ``[n, ...]`` likewise.

    Returns:
        The figure.

    Raises:
        ImportError: without Matplotlib.
        ValueError: for components that are not there, or axes of another shape.
    """
    plt, name = pyplot(), fit.energy_site(site)
    size = int(np.prod(fit.energy_prior(name).event_shape))
    chosen = list(range(min(size, MOST_PAIRED))) if components is None else list(components)
    if not chosen or not all(0 <= i < size for i in chosen):
        raise ValueError(f"plot_pairs: components must be among the {size} of '{name}', got {components!r}.")
    clouds = [
        ("prior walkers", fit.prior_samples()[name] if walkers is None else walkers, "red"),
        (*_particles_or_data(fit, name, particles), "C0"),
    ]
    shown = [(label, np.asarray(x, float).reshape(-1, size)[:, chosen], c) for label, x, c in clouds if x is not None]
    shown.sort(key=lambda cloud: -len(cloud[1]))  # few on top of many
    bins = int(np.clip(2 * np.sqrt(min(len(x) for _, x, _ in shown)), 5, 40))
    shape = (len(chosen), len(chosen))
    if axes is None:
        _, axes = plt.subplots(*shape, figsize=(2.2 * shape[0] + 0.6,) * 2, layout="constrained", squeeze=False)
    axes = np.asarray(axes, dtype=object)
    if axes.shape != shape:
        raise ValueError(f"plot_pairs: axes must be {shape}, one for each pair, got {axes.shape}.")
    low, high = _bulk(np.concatenate([x for _, x, _ in shown]))
    margin = 0.1 * np.maximum(high - low, 1e-3)
    for (i, j), ax in np.ndenumerate(axes):
        if j > i:
            ax.set_visible(False)
            continue
        for _, x, colour in shown:
            if i == j:
                ax.hist(x[:, i], np.linspace(low[i], high[i], bins), density=True, histtype="step", color=colour)
                continue
            few = x[spaced(len(x), MAX_POINTS)]
            ax.scatter(few[:, j], few[:, i], s=np.clip(2000 / len(few), 3, 12), alpha=0.5, linewidths=0, color=colour)
        ax.set_xlim(low[j] - margin[j], high[j] + margin[j])
        if i == j:
            ax.set_yticks([])
        else:
            ax.set_ylim(low[i] - margin[i], high[i] + margin[i])
        ax.set_xlabel(f"coordinate {chosen[j]}" if i == shape[0] - 1 else "")
        ax.set_ylabel(f"coordinate {chosen[i]}" if j == 0 and i else "")
        ax.tick_params(labelbottom=i == shape[0] - 1, labelleft=j == 0 and i > 0)
    for label, x, colour in shown:
        axes[0, 0].plot([], [], color=colour, label=f"{label} ({len(x)})")
    axes[0, 0].figure.legend(loc="upper right", title=f"fitted prior of {name}", fontsize="small")
    return axes[0, 0].figure


# --- parts ----------------------------------------------------------------------------------------------


def _particles_or_data(fit: "Fit", name: str, given: Any = None) -> tuple[str, Any]:
    """Return what an energy prior's walkers should look like by name, and it, if not given: None without draws."""
    observed = fit.config.model.energies[name].observed
    what = "data" if observed else "posterior particles"
    if given is not None:
        return what, given
    if observed:
        return what, trace_sites(fit, spaced(fit.config.model.num_data, MAX_POINTS), {})[1][name].values
    draws = fit.get_samples().get(name)
    return what, None if draws is None else draws[:, -1]


def _check_two_dimensional(prior: EnergyPrior, name: str) -> None:
    if prior.batch_shape or prior.event_shape != (2,):
        raise ValueError(
            f"plot_energy draws priors with event shape (2,) and no batch shape; '{name}' has event shape "
            f"{prior.event_shape} and batch shape {prior.batch_shape}. plot_pairs draws more coordinates."
        )


def _cloud(x: Any) -> np.ndarray:
    """Return points ``[n, 2]`` of any number of axes before the last."""
    x = np.asarray(x, dtype=float)
    if x.shape[-1] != 2:
        raise ValueError(f"walkers and particles must have shape [..., 2], got {x.shape}.")
    return x.reshape(-1, 2)


def _bulk(points: np.ndarray) -> np.ndarray:
    """Return the ends ``[2, d]`` between which nearly all of the points ``[n, d]`` are, by coordinate."""
    return np.quantile(points, [0.002, 0.998], axis=0)


def _limits(points: np.ndarray) -> tuple[float, float, float, float]:
    """Return where the bulk of the points is, with a margin of a fifth."""
    low, high = _bulk(points)
    margin = 0.2 * np.maximum(high - low, 1e-3)
    (left, bottom), (right, top) = low - margin, high + margin
    return float(left), float(right), float(bottom), float(top)


def _frame(ax: "Axes", points: np.ndarray) -> None:
    left, right, bottom, top = _limits(points)
    ax.set(xlim=(left, right), ylim=(bottom, top))


def _grid(x: np.ndarray, image_shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
    return tiles(x.reshape(-1, *image_shape), int(np.ceil(np.sqrt(len(x)))), low, high)
