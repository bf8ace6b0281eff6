"""The sites of a fit: names for their axes, and which of the data are meant."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.handlers import simulated
from numpyro_ebipla.training.fitted import Fitted


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
    fit: Fitted, chosen: np.ndarray, dims: dict[str, list[str]], values: bool = True
) -> tuple[dict[str, Site], dict[str, Variable]]:
    """Return all sites' layouts, and the observed values of the chosen data (empty unless ``values``)."""
    model, found = fit.config.model, {}
    batch = fit.batch(jnp.asarray(chosen, jnp.int32) if model.subsampled else None, random.key(0))

    def run(batch: Batch) -> dict[str, Array]:
        trace, _ = model.trace(fit.params, {}, {}, batch)
        for name, site in trace.items():
            # Deterministic sites may hold trees, which have no axes.
            if site["type"] in ("sample", "deterministic") and jax.tree_util.all_leaves([site["value"]]):
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


def _site(fit: Fitted, name: str, site: dict[str, Any], given: list[str] | None) -> Site:
    """Name the axes: those of plates by the plate, others as the site or ``given`` says, or by number."""
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
        names[len(shape) + layout.axis] = fit.plate_name
    if len(events) == event_dim and events:
        names[len(shape) - event_dim :] = events
    given_names = check_dims(name, given, len(shape))
    for axis, own in enumerate(names):
        if given_names and fit.plate_name and (given_names[axis] == fit.plate_name) != (own == fit.plate_name):
            where = f"which is axis {names.index(fit.plate_name)}" if fit.plate_name in names else "which it has not"
            raise ValueError(
                f"dims: '{name}' must have the plate '{fit.plate_name}' in its place, {where}; got {given}."
            )
    names = list(given_names or names)
    unnamed = iter(range(len(shape)))
    dims = tuple(f"{name}_dim_{next(unnamed)}" if dim is None else dim for dim in names)
    return Site(dims, event_dim, site["type"] == "sample" and simulated(site))


def restricted(
    fit: Fitted, name: str, value: np.ndarray, dims: tuple[str, ...], chosen: np.ndarray, data: bool = False
) -> Variable:
    """Cut ``[chain, draw, ...]`` to the chosen data; for ``data``, without chain and draw."""
    model, plate = fit.config.model, fit.plate_name
    if plate in dims:
        axis = 2 + dims.index(plate)
        if data:
            at = np.arange(len(chosen)) if model.subsampled else chosen
        else:  # sites without a known data axis were collected whole
            at = positions(fit, chosen) if fit.layout[name].axis is not None else chosen
        value = np.take(value, at, axis)
    return Variable(value[0, 0] if data else np.asarray(value), dims)


def posterior_variables(
    fit: Fitted, var_names: Sequence[str] | None, chosen: np.ndarray, dims: dict[str, list[str]]
) -> dict[str, Variable]:
    """Return the draws at ``var_names`` (None: all) of the chosen data.

    Raises:
        ValueError: for a site that was not collected.
    """
    if isinstance(var_names, str):
        var_names = [var_names]
    samples = fit.get_samples()
    for name in var_names or ():
        if name not in samples:
            raise ValueError(f"var_names: '{name}' was not collected; there are {list(samples)}.")
    sites, _ = trace_sites(fit, chosen, dims, values=False)
    names = samples if var_names is None else var_names
    return {name: restricted(fit, name, samples[name], sites[name].dims, chosen) for name in names}


# --- which data ---------------------------------------------------------------------------------------


def positions(fit: Fitted, chosen: np.ndarray) -> np.ndarray:
    """Return where the chosen data are among the collected ones."""
    place = np.zeros(fit.config.model.num_data, int)
    collected = fit.collected
    place[collected] = np.arange(len(collected))
    return place[chosen]


def chosen_indices(fit: Fitted, indices: Any) -> np.ndarray:
    """Return ``indices`` checked, by default all that were collected.

    Raises:
        ValueError: for one that was not collected.
    """
    collected = fit.collected
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
    """Return the names of a variable's axes as a tuple, None if none are given.

    Raises:
        ValueError: unless there is a name for each axis.
    """
    if given is not None and len(given) != ndim:
        raise ValueError(f"dims: '{name}' has {ndim} axes, got the names {given}.")
    return None if given is None else tuple(given)
