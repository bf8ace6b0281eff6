"""A fit as ArviZ has it, on both of its lines: 0.x (``InferenceData``) and 1.x (``DataTree``)."""

import inspect
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from jax import Array, random

from numpyro_ebipla._core.static import is_array
from numpyro_ebipla._core.tree import by_path
from numpyro_ebipla._core.validate import check_scalar
from numpyro_ebipla.results.at_draws import log_likelihood as likelihood_at_draws
from numpyro_ebipla.results.at_draws import posterior_predictive as predicted_at_draws
from numpyro_ebipla.results.sites import (
    Site,
    Variable,
    check_dims,
    chosen_indices,
    positions,
    posterior_variables,
    trace_sites,
)
from numpyro_ebipla.training.fitted import Fitted

#: Tag by which the key of a conversion is derived from the state's own.
KEY_ARVIZ = 0xA2
#: Attribute of variables and coordinates that could not keep their name.
NAME_IN_MODEL = "name_in_model"


def import_arviz() -> ModuleType:
    """Return the ArviZ module.

    Raises:
        ImportError: saying how to install it.
    """
    try:
        import arviz
    except ImportError as e:
        raise ImportError("to_arviz needs ArviZ: pip install numpyro_ebipla[arviz].") from e
    return arviz


def convert(
    fit: Fitted,
    var_names: Sequence[str] | None,
    indices: Any,
    *,
    log_likelihood: bool,
    posterior_predictive: bool,
    prior: bool,
    coords: dict[str, Any],
    dims: dict[str, list[str]],
    rng_key: Array | None,
    max_bytes: int,
) -> Any:
    """Convert a fit; see :meth:`.Fit.to_arviz`."""
    az = import_arviz()
    check_scalar("max_bytes", max_bytes, lambda x: x > 0, "a number above 0")
    chosen = chosen_indices(fit, indices)
    key = fit.key(KEY_ARVIZ, rng_key)
    sites, observed = trace_sites(fit, chosen, dims)
    if unknown := sorted({*dims} - {*sites} - {*_arguments(fit)}):
        raise ValueError(
            f"dims: there is no site or argument {unknown}; there are {sorted({*sites, *_arguments(fit)})}."
        )
    key_prior, key_likelihood, key_predictive = random.split(key, 3)
    groups: dict[str, dict[str, Variable]] = {}
    if fit.draws is not None:
        groups["posterior"] = posterior_variables(fit, var_names, chosen, dims)
        groups["sample_stats"] = sample_stats(fit, chosen)
    elif posterior_predictive:
        raise ValueError(
            "the model has no latents, so there is no posterior to predict from: the group 'prior' "
            "(or fit.energy_prior().sample) has draws of the fitted energy prior."
        )
    if posterior_predictive:
        groups["posterior_predictive"] = predicted_at_draws(fit, chosen, sites, key_predictive, max_bytes)
    if log_likelihood:
        groups["log_likelihood"] = likelihood_at_draws(fit, chosen, sites, key_likelihood, max_bytes)
    if prior and fit.config.model.energies:
        groups["prior"] = prior_walkers(fit, chosen, sites, key_prior)
    groups["observed_data"] = observed
    groups["constant_data"] = constant_data(fit, chosen, observed, dims)
    coords = check_coords(fit, chosen, coords)
    written = legal_names({name for group in groups.values() for name, v in group.items() for name in (name, *v.dims)})
    datasets = {name: _dataset(name, group, coords, written) for name, group in groups.items() if group}
    if az.__version__.startswith("0."):
        return az.InferenceData(**datasets)
    from xarray import DataTree

    return DataTree.from_dict(datasets)


# --- the groups ---------------------------------------------------------------------------------------


def sample_stats(fit: Fitted, chosen: np.ndarray) -> dict[str, Variable]:
    """Return the log density, by datum where it is so known, and the acceptance of each draw's moves."""
    assert fit.draws is not None
    lp = np.asarray(fit.draws.log_density)
    if lp.ndim == 3:
        stats = {"lp": Variable(np.take(lp, positions(fit, chosen), 2), (fit.plate_name or "lp_dim_0",))}
    else:
        stats = {"lp": Variable(lp, ())}
    for name, value in fit.draws.accept.items():
        # One number per draw, averaged over the particles, shown at each of them.
        each = np.broadcast_to(np.asarray(value), (fit.num_chains, fit.num_samples))
        stats[name.replace("accept", "acceptance_rate")] = Variable(each, ())
    return stats


def prior_walkers(fit: Fitted, chosen: np.ndarray, sites: dict[str, Site], rng_key: Array) -> dict[str, Variable]:
    """Return one chain whose draws are the walkers."""
    result = {}
    plate = fit.plate_name
    for name, value in fit.prior_samples(rng_key, chosen).items():
        site = sites[name]
        # An unconditional prior has no axis for the plate (and no plate's axis has length one by chance).
        batch = value.ndim - 1 - site.event_dim
        dims = site.batch_dims[len(site.batch_dims) - batch :] + site.dims[len(site.dims) - site.event_dim :]
        if not fit.config.model.energies[name].per_datum:
            dims = tuple(f"{name}_prior_dim_{i}" if dim == plate else dim for i, dim in enumerate(dims))
        result[name] = Variable(value[None], dims)
    return result


def constant_data(
    fit: Fitted, chosen: np.ndarray, observed: dict[str, Variable], dims: dict[str, list[str]]
) -> dict[str, Variable]:
    """Return array arguments of the model that are not an observed site's data."""
    full = {name: v.values for name, v in observed.items()}
    if len(chosen) < fit.config.model.num_data:
        full = {name: v.values for name, v in trace_sites(fit, np.arange(fit.config.model.num_data), {})[1].items()}
    result = {}
    for name, value in _arguments(fit).items():
        value = np.asarray(value)
        if value.dtype.kind not in "biufc" or any(np.array_equal(value, known) for known in full.values()):
            continue
        names = check_dims(name, dims.get(name), value.ndim)
        if names is not None and fit.plate_name in names:
            size, number = value.shape[names.index(fit.plate_name)], fit.config.model.num_data
            if size != number:
                raise ValueError(
                    f"dims: the axis of '{name}' named '{fit.plate_name}' has length {size}, not {number}."
                )
        if names is None:
            names = tuple(f"{name}_dim_{i}" for i in range(value.ndim))
        elif fit.plate_name in names:
            value = np.take(value, chosen, names.index(fit.plate_name))
        result[name] = Variable(value, names)
    return result


# --- coordinates and arguments ------------------------------------------------------------------------


def check_coords(fit: Fitted, chosen: np.ndarray, coords: dict[str, Any]) -> dict[str, Any]:
    """Return the coordinates, those of the data plate cut to the chosen data."""
    plate = fit.plate_name
    if plate is None:
        return coords
    labels = np.asarray(coords.get(plate, np.arange(fit.config.model.num_data)))
    if labels.shape != (fit.config.model.num_data,):
        raise ValueError(
            f"coords: '{plate}' has {labels.size} values for {fit.config.model.num_data} data; give one "
            "for each datum, also with indices=…."
        )
    return {**coords, plate: labels[chosen]}


def _arguments(fit: Fitted) -> dict[str, Any]:
    """Return the model's array arguments by name; leaves of a pytree by path."""
    try:
        bound = inspect.signature(fit.config.model.model).bind(*fit.args, **fit.kwargs).arguments
    except (TypeError, ValueError):
        bound = {**{f"arg_{i}": x for i, x in enumerate(fit.args)}, **fit.kwargs}
    result: dict[str, Any] = {}
    for name, value in bound.items():
        result |= {name + path: leaf for path, leaf in by_path(value).items() if is_array(leaf)}
    return result


def legal_names(names: Iterable[str]) -> dict[str, str]:
    """Return ``{name: name without slashes}``: they part groups in a ``DataTree`` and in a netCDF file.

    >>> sorted(legal_names(["a/b", "x", "a.b"]).items())
    [('a.b', 'a.b'), ('a/b', 'a.b_'), ('x', 'x')]
    """
    written: dict[str, str] = {}
    for name in sorted(names, key=lambda name: ("/" in name, name)):
        legal = name.replace("/", ".")
        while legal in written.values():
            legal += "_"
        written[name] = legal
    return written


def _dataset(group: str, variables: dict[str, Variable], coords: dict[str, Any], written: dict[str, str]) -> Any:
    import xarray as xr

    own_name = lambda name: {} if written.get(name, name) == name else {NAME_IN_MODEL: name}
    lead = () if group.endswith("_data") else ("chain", "draw")
    arrays, labels = {}, {}
    for name, v in variables.items():
        dims = (*lead, *(written[dim] for dim in v.dims))
        arrays[written[name]] = (dims, v.values, own_name(name))
        for dim, size in zip((*lead, *v.dims), v.values.shape, strict=True):
            label = np.asarray(coords.get(dim, np.arange(size)))
            if label.shape != (size,):
                raise ValueError(
                    f"coords: '{dim}' has shape {label.shape}, but its axis of '{name}' has length {size}."
                )
            labels[written.get(dim, dim)] = (written.get(dim, dim), label, own_name(dim))
    attrs = {"inference_library": "numpyro_ebipla", "group": group}
    return xr.Dataset(arrays, coords=labels, attrs=attrs)
