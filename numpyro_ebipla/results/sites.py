"""The sites of a fit: names for their axes, which data of them are meant, and the model on the data collected.

``fit`` below is a :class:`~numpyro_ebipla.results.fit.Fit`, which stands above this module.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_ebipla.model.handlers import simulated
from numpyro_ebipla.model.latent_model import Batch, LatentModel
from numpyro_ebipla.training.collect import Layout


class Variable(NamedTuple):
    """Values, and names of their axes after ``chain`` and ``draw``."""

    values: np.ndarray
    dims: tuple[str, ...]


class Site(NamedTuple):
    """How a sample or deterministic site is laid out.

    Attributes:
        dims: a name for each axis of its value.
        event_dim: of its distribution.
        observed: whether it is (``factor`` sites are not).
    """

    dims: tuple[str, ...]
    event_dim: int
    observed: bool

    @property
    def batch_dims(self) -> tuple[str, ...]:
        """Names of the axes of its log density."""
        return self.dims[: len(self.dims) - self.event_dim]


# --- layout -------------------------------------------------------------------------------------------


def trace_sites(
    fit: Any, chosen: np.ndarray, dims: dict[str, list[str]], values: bool = True
) -> tuple[dict[str, Site], dict[str, Variable]]:
    """All sites' layouts, and the observed values of the chosen data (empty unless ``values``)."""
    model, found = fit.config.model, {}
    batch = fit._batch(jnp.asarray(chosen, jnp.int32) if model.subsampled else None, random.key(0))

    def run(batch: Batch) -> dict[str, Array]:
        trace, _ = model.trace(fit.params, {}, {}, batch)
        for name, site in trace.items():
            if site["type"] in ("sample", "deterministic"):
                found[name] = _site(fit, name, site, dims.get(name))
        return {name: trace[name]["value"] for name, site in found.items() if site.observed}

    if not values:
        jax.eval_shape(run, batch)
        return found, {}
    # Compiled, all that the observed values do not depend on is left out.
    observed = jax.jit(run)(batch)
    return found, {
        name: restricted(fit, name, np.asarray(value)[None, None], found[name].dims, chosen, data=True)
        for name, value in observed.items()
    }


def _site(fit: Any, name: str, site: dict[str, Any], given: list[str] | None) -> Site:
    """Axes of plates named by the plate, others as the site or ``given`` says, or by number."""
    shape, frames = jnp.shape(site["value"]), site["cond_indep_stack"]
    event_dim, events = 0, []
    names: list[str | None] = [None] * len(shape)
    if site["type"] == "sample":
        event_dim = min(site["fn"].event_dim, len(shape))
        events = list(site["infer"].get("event_dims", ()))
        batch = len(shape) - event_dim
    else:  # a deterministic site in plates: their axes lead
        batch = max((-frame.dim for frame in frames), default=0)
    for frame in frames:
        axis = batch + frame.dim
        if 0 <= axis < len(shape) and shape[axis] == frame.size:
            names[axis] = frame.name
    layout = fit.layout.get(name)
    if layout is not None and layout.axis is not None:
        names[len(shape) + layout.axis] = plate_name(fit)
    if len(events) == event_dim and events:
        names[len(shape) - event_dim :] = events
    names = list(check_dims(name, given, len(shape)) or names)
    unnamed = iter(range(len(shape)))
    dims = tuple(f"{name}_dim_{next(unnamed)}" if dim is None else dim for dim in names)
    return Site(dims, event_dim, site["type"] == "sample" and simulated(site))


def restricted(
    fit: Any, name: str, value: np.ndarray, dims: tuple[str, ...], chosen: np.ndarray, data: bool = False
) -> Variable:
    """``[chain, draw, ...]`` cut to the chosen data; of ``data``, without chain and draw."""
    model, plate = fit.config.model, plate_name(fit)
    if plate in dims:
        axis = 2 + dims.index(plate)
        if data:
            at = np.arange(len(chosen)) if model.subsampled else chosen
        else:  # sites without a known data axis were collected whole
            at = positions(fit, chosen) if fit.layout[name].axis is not None else chosen
        value = np.take(value, at, axis)
    return Variable(value[0, 0] if data else np.asarray(value), dims)


# --- which data ---------------------------------------------------------------------------------------


def plate_name(fit: Any) -> str | None:
    """The data plate's name."""
    return fit.config.model.plate.name if fit.config.model.plate else None


def all_indices(fit: Any) -> np.ndarray:
    return np.arange(fit.config.model.num_data)


def _collected(fit: Any) -> np.ndarray:
    return all_indices(fit) if fit.plan.indices is None else np.asarray(fit.plan.indices)


def positions(fit: Any, chosen: np.ndarray) -> np.ndarray:
    """Where the chosen data are among the collected ones."""
    place = np.zeros(fit.config.model.num_data, int)
    collected = _collected(fit)
    place[collected] = np.arange(len(collected))
    return place[chosen]


def chosen_indices(fit: Any, indices: Any) -> np.ndarray:
    """``indices`` checked, by default all that were collected.

    Raises:
        ValueError: for one that was not collected.
    """
    collected = _collected(fit)
    if indices is None:
        return collected
    indices = np.atleast_1d(np.asarray(indices))
    if not np.issubdtype(indices.dtype, np.integer) or indices.ndim != 1 or not len(indices):
        raise ValueError(f"indices must be integers, one axis and at least one, got {indices!r}.")
    missing = np.setdiff1d(indices, collected)
    if len(missing):
        raise ValueError(
            f"indices: the data {missing[:5].tolist()} were not collected; there are {len(collected)} of "
            f"{fit.config.model.num_data} (run(indices=…) says which)."
        )
    return indices


def check_dims(name: str, given: list[str] | None, ndim: int) -> tuple[str, ...] | None:
    if given is not None and len(given) != ndim:
        raise ValueError(f"dims: '{name}' has {ndim} axes, got the names {given}.")
    return None if given is None else tuple(given)


# --- the data collected -------------------------------------------------------------------------------


class Visiting(Messenger):
    """The model on the data whose latents were collected, in their order.

    A subsampled plate gets their indices, or all of a plate of another size. Where the plate is not
    subsampled the model cannot be told which data to visit: then latents of data that were not collected
    become NaN, and so does what is computed from them.
    """

    def __init__(self, fn: Callable, model: LatentModel, layout: dict[str, Layout], indices: np.ndarray | None) -> None:
        super().__init__(fn)
        self.plate, self.subsampled, self.num_data = model.plate, model.subsampled, model.num_data
        self.indices = indices
        self.axes = {name: layout[name].axis for name in model.latents if name in layout}

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "plate" or self.plate is None or msg["name"] != self.plate.name:
            return
        size, batch = msg["args"]
        if batch is None or batch == size:
            return
        collected = self.indices is not None and size == self.plate.size
        with jax.ensure_compile_time_eval():  # so that models may index NumPy arrays with it
            msg["value"] = jnp.asarray(self.indices if collected else np.arange(size), jnp.int32)
        msg["args"] = (size, msg["value"].shape[0])

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if self.indices is None or self.subsampled or msg["type"] != "sample":
            return
        axis = self.axes.get(msg["name"])
        if axis is not None and jnp.shape(msg["value"])[axis] == len(self.indices):
            msg["value"] = spread(msg["value"], axis, self.indices, self.num_data)


def on_collected(fit: Any) -> Any:
    """The fit with its parameters put into its model, which visits the data collected, as do deterministic sites."""
    fitted = handlers.substitute(fit.model, data={**fit.params, **fit.state.mutable})
    model = Visiting(fitted, fit.config.model, fit.layout, fit.plan.indices)
    return _cut_deterministic(replace(fit, model=model))


def _cut_deterministic(fit: Any) -> Any:
    """Cut deterministic sites to the chosen data where the latents are, so that all axes of the plate agree.

    A plate that is not subsampled computes them for all data.
    """
    model, indices = fit.config.model, fit.plan.indices
    cut = [name for name in model.latents if name in fit.layout and fit.layout[name].axis is not None]
    if fit.draws is None or indices is None or model.subsampled or not cut:
        return fit
    sites, _ = trace_sites(fit, np.asarray(indices), {}, values=False)
    samples, layout, plate = dict(fit.draws.samples), dict(fit.layout), plate_name(fit)
    for name, value in samples.items():
        if name in model.latents or plate not in sites[name].dims:
            continue
        axis = sites[name].dims.index(plate) - len(sites[name].dims)
        samples[name] = np.take(value, indices, axis)
        layout[name] = layout[name]._replace(axis=axis)
    return replace(fit, draws=fit.draws._replace(samples=samples), layout=layout)


def spread(value: Any, axis: int, indices: np.ndarray, size: int) -> Any:
    """``value`` at ``indices`` of an axis of length ``size``, NaN elsewhere."""
    value = jnp.moveaxis(jnp.asarray(value), axis, 0)
    full = jnp.full((size, *value.shape[1:]), jnp.nan, value.dtype)
    return jnp.moveaxis(full.at[np.asarray(indices)].set(value), 0, axis)
