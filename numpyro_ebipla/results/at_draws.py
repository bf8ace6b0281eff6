"""The model run again at every draw: log densities and predictions of the observed sites."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from numpyro import handlers

from numpyro_ebipla._core.state import Params
from numpyro_ebipla._core.static import join_static
from numpyro_ebipla.likelihood.normalisers import NUM_POPULATIONS, normalisers
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.energy import subtracting
from numpyro_ebipla.model.handlers import copy_containers, from_base, trace_model
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.results.sites import Site, Variable, positions
from numpyro_ebipla.results.visiting import spread
from numpyro_ebipla.training.fitted import Fitted


class Reading(NamedTuple):
    """What is read from the model at a draw.

    Attributes:
        group: of ArviZ.
        redraw: whether observed sites are drawn anew.
        names: of the sites.
    """

    group: str
    redraw: bool
    names: tuple[str, ...]


def log_likelihood(
    fit: Fitted, chosen: np.ndarray, sites: dict[str, Site], rng_key: Array, max_bytes: int
) -> dict[str, Variable]:
    """Return log densities of the observed sites at each draw, energy priors normalised."""
    dims = {name: site.batch_dims for name, site in sites.items() if site.observed}
    return _read(fit, chosen, Reading("log_likelihood", False, tuple(dims)), dims, rng_key, max_bytes)


def posterior_predictive(
    fit: Fitted, chosen: np.ndarray, sites: dict[str, Site], rng_key: Array, max_bytes: int
) -> dict[str, Variable]:
    """Return the observed sites redrawn for each draw."""
    dims = {name: site.dims for name, site in sites.items() if site.observed}
    return _read(fit, chosen, Reading("posterior_predictive", True, tuple(dims)), dims, rng_key, max_bytes)


def _read(
    fit: Fitted,
    chosen: np.ndarray,
    reading: Reading,
    dims: dict[str, tuple[str, ...]],
    rng_key: Array,
    max_bytes: int,
) -> dict[str, Variable]:
    """Read the model at every draw, in blocks of B data if it is subsampled."""
    model, samples = fit.config.model, fit.get_samples(group_by_chain=False)
    missing = [name for name in model.latents if name not in samples]
    if missing:
        raise ValueError(
            f"{reading.group} needs draws of all latents, and {missing} were not collected: run() with sites=None."
        )
    key_shared, key_blocks = random.split(rng_key)
    blocks = model.blocks(chosen, joint=False)
    shared, own = (() if reading.redraw else _observed(model, per_datum) for per_datum in (False, True))
    find = model.compiled(normalisers, shared, NUM_POPULATIONS)
    log_z = find(fit.params, fit.batch(blocks[0], key_shared)) if shared else {}
    log_z = {name: estimate.value for name, estimate in log_z.items()}
    program = model.compiled(_at_draws, reading, own, fit.num_chains * fit.num_samples)

    def of_block(batch: Batch) -> dict[str, Array]:
        return program(fit.params, batch, placed_draws(fit, samples, batch.indices), log_z)

    first = fit.batch(blocks[0], rng_key)
    shapes = jax.eval_shape(program, fit.params, first, placed_draws(fit, samples, first.indices), log_z)
    _check_memory(reading.group, shapes, len(blocks), max_bytes)
    names = {name: dims[name][len(dims[name]) - (value.ndim - 1) :] for name, value in shapes.items()}
    axes = {n: 1 + d.index(fit.plate_name) if fit.plate_name in d else None for n, d in names.items()}
    found = model.map_blocks(of_block, fit.batch(None, key_blocks), axes, chosen, joint=False)
    shape = (fit.num_chains, fit.num_samples)
    return {n: Variable(np.asarray(value).reshape(*shape, *value.shape[1:]), names[n]) for n, value in found.items()}


def _observed(model: LatentModel, per_datum: bool) -> tuple[str, ...]:
    """Return the observed energy priors with a normaliser for each datum, or with one for all."""
    return tuple(name for name, site in model.energies.items() if site.observed and site.per_datum == per_datum)


def _check_memory(group: str, shapes: dict[str, Any], num_blocks: int, max_bytes: int) -> None:
    """Raise if a group would be too large.

    Raises:
        ValueError: naming the group.
    """
    total = sum(math.prod(s.shape) * s.dtype.itemsize for s in shapes.values()) * num_blocks
    if total > max_bytes:
        raise ValueError(
            f"{group} would take {total / 2**30:.2g} GiB, above max_bytes ({max_bytes / 2**30:.2g} GiB): "
            "choose fewer indices=…, collect fewer draws, or raise max_bytes."
        )


def _at_draws(
    model: LatentModel,
    reading: Reading,
    own: tuple[str, ...],
    num: int,
    params: Params,
    batch: Batch,
    latents: dict[str, Array],
    log_z: dict[str, Array],
) -> dict[str, Array]:
    """Run the model at ``num`` draws of its latents, ``[num, …]``.

    ``own`` are energy priors whose normalisers, one for each datum, are estimated here; ``log_z`` are the others'.
    """
    key_normaliser, key_draws = random.split(batch.rng_key)
    estimates = normalisers(model, own, NUM_POPULATIONS, params, batch._replace(rng_key=key_normaliser))
    log_z = log_z | {name: estimate.value for name, estimate in estimates.items()}
    read: Callable = _values if reading.redraw else _log_densities

    def one(args: tuple[Array, dict]) -> dict[str, Array]:
        key, values = args
        values = {**params, **copy_containers(batch.mutable), **values}
        if batch.indices is not None and model.plate is not None:
            values[model.plate.name] = batch.indices
        placed = handlers.substitute(model.model, data=values)
        seeded = handlers.seed(handlers.uncondition(placed) if reading.redraw else placed, key)
        return read(seeded, join_static(batch.data, model.static_arguments), reading.names, log_z)

    return lax.map(one, (random.split(key_draws, num), latents))


def _values(model: Callable, arguments: Any, names: tuple[str, ...], log_z: dict[str, Array]) -> dict[str, Array]:
    """Return the sites' values; energy priors that are observed are drawn from the priors themselves."""
    del log_z
    trace = trace_model(model, *arguments)
    return {name: trace[name]["value"] for name in names}


def _log_densities(
    model: Callable, arguments: Any, names: tuple[str, ...], log_z: dict[str, Array]
) -> dict[str, Array]:
    """Return the sites' log densities in their batch shapes."""
    trace, result = trace_model(from_base(model), *arguments), {}
    for name in names:
        fn = trace[name]["fn"]
        with subtracting(log_z.get(name, 0.0)):
            value = fn.log_prob(trace[name]["value"])
        result[name] = jnp.broadcast_to(value, jnp.broadcast_shapes(value.shape, fn.batch_shape))
    return result


def placed_draws(fit: Fitted, samples: dict[str, np.ndarray], block: Array | None) -> dict[str, Any]:
    """Return draws of the latents ``[n, ...]`` as the model wants them: of the block's data, or of all of them."""
    model, result = fit.config.model, {}
    for name in model.latents:
        value: Any = samples[name]
        axis = fit.layout[name].axis
        if axis is not None and block is not None:
            value = np.take(value, positions(fit, np.asarray(block)), axis)
        elif axis is not None and fit.plan.indices is not None:
            value = spread(value, axis, fit.plan.indices, model.num_data)
        result[name] = value
    return result
