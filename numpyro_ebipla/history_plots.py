"""What a run went through: its history, and the path of its parameters.

All are importable from :mod:`numpyro_ebipla.plots`.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from numpyro_ebipla.image_plots import pyplot
from numpyro_ebipla.results.estimates import has_information, parameter_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from numpyro_ebipla.results.fit import Fit

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
    history = fit.history
    num_steps = len(fit.losses)
    if not num_steps:
        raise ValueError("plot_history: the fit took no steps, so there is no history.")
    panels = [(*panel[:3], [k for k in history if panel[3](k)]) for panel in _PANELS]
    panels = [panel for panel in panels if panel[3]]
    axes = _grid("plot_history", axes, len(panels), next((n for n in (3, 2) if len(panels) % n == 0), 4))
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


def plot_parameters(
    fit: "Fit", axes: Sequence["Axes"] | None = None, *, prob: float | None = 0.95, names: Sequence[str] | None = None
) -> Any:
    """Plot the path of the parameters, one panel for each site, with the estimates and their Wald intervals.

    Lines are single steps in the declared space. The estimate (dashed) is an average over the last steps; the band is
    its interval, which tells the noise of a path from what matters.

    Args:
        fit: of :meth:`.EBIPLA.run`, with up to 32 parameters.
        axes: at least as many as there are panels, by default those of a new figure.
        prob: that an interval covers; None draws none, as standard errors take a moment. There are none where
            :meth:`.Fit.standard_errors` has none.
        names: sites to plot, by default all.

    Returns:
        The figure.

    Raises:
        ImportError: without Matplotlib.
        ValueError: if no path was kept, as the fit has more parameters or took no steps; for unknown names, or too few
            axes.
    """
    path = fit.history.get("params")
    if path is None or not len(path):
        raise ValueError("plot_parameters: no path was kept; it is kept of up to 32 parameters, by run(…).")
    values = _declared(fit, path)
    chosen = list(values) if names is None else [name for name in names if name in values]
    if not chosen or (names is not None and len(chosen) < len(names)):
        raise ValueError(f"plot_parameters: names must be among {[*values]}, got {names!r}.")
    axes = _grid("plot_parameters", axes, len(chosen), min(len(chosen), 3))
    estimates = {site: np.ravel(ravel_pytree({site: fit.params[site]})[0]) for site in chosen}
    intervals = {}
    if prob is not None and has_information(fit):
        table = fit.summary(prob=prob)
        intervals = dict(zip(table.names, zip(table.lower, table.upper, strict=True), strict=True))
    steps = int(fit.state.step) - len(path) + 1 + np.arange(len(path))
    for ax, name in zip(axes, chosen, strict=False):
        ends: list[float] = []
        for (label, line), estimate in zip(values[name].items(), estimates[name], strict=True):
            (drawn,) = ax.plot(steps, line, lw=1, label=label)
            ax.axhline(estimate, color=drawn.get_color(), ls="--", lw=1)
            interval = intervals.get(label, ())
            if len(interval) and np.isfinite(interval).all():
                ax.axhspan(*interval, color=drawn.get_color(), alpha=0.15, lw=0)
                ends += interval
        _cut_first_steps(ax, np.stack([*values[name].values()]), ends)
        ax.set(title=name, xlabel="step")
        if len(values[name]) > 1:
            ax.legend(fontsize="small", ncols=-(-len(values[name]) // 8))
    return axes[0].figure


# --- parts ----------------------------------------------------------------------------------------------


def _grid(function: str, axes: Sequence["Axes"] | None, number: int, columns: int) -> list["Axes"]:
    """Return axes for so many panels: those given, or a new figure's."""
    if axes is None:
        rows = -(-number // columns)
        size = (4 * columns, 3 * rows)
        _, grid = pyplot().subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        axes = list(grid.flat)
        for ax in axes[number:]:
            ax.set_visible(False)
    axes = list(np.ravel(np.asarray(axes, dtype=object)))
    if len(axes) < number:
        raise ValueError(f"{function}: {number} panels need as many axes, got {len(axes)}.")
    return axes


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


def _declared(fit: "Fit", path: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Return ``{site: {name of a number: [K]}}`` of a path ``[K, L]``, in the declared space."""
    _, unflatten = ravel_pytree(fit.state.params)
    constrained = lambda theta: fit.config.model.constrain_params(unflatten(theta))
    columns = np.asarray(jax.vmap(lambda theta: ravel_pytree(constrained(theta))[0])(path)).T
    first, found = constrained(path[0]), iter(columns)
    return {site: {name: next(found) for name in parameter_names({site: first[site]})} for site in sorted(first)}


def _cut_first_steps(ax: "Axes", values: np.ndarray, kept: Sequence[float] = ()) -> None:
    """Let the axis end near the values ``[lines, K]`` of the later steps, if the first ones would flatten them.

    Numbers that are ``kept`` stay inside.
    """
    early, later = np.split(values, [int(FIRST_STEPS * values.shape[1])], axis=1)
    early, later = early[np.isfinite(early)], np.concatenate([later[np.isfinite(later)], kept])
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
