"""The model run again at every draw: log densities and predictions of the observed sites."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from numpyro import handlers

from numpyro_ebipla._core.static import join_static
from numpyro_ebipla.model.energy import log_normaliser
from numpyro_ebipla.model.handlers import copy_containers, from_base, trace_model
from numpyro_ebipla.model.latent_model import Batch
from numpyro_ebipla.results.sites import Site, Variable, plate_name, positions
from numpyro_ebipla.results.visiting import spread
from numpyro_ebipla.smc.anneal import anneal

#: Walkers for the log normaliser of an observed energy prior.
NORMALISER_WALKERS = 1000


def likelihood(
    fit: Any, chosen: np.ndarray, sites: dict[str, Site], rng_key: Array, max_bytes: int
) -> dict[str, Variable]:
    """Log density of the observed sites at each draw."""
    names = [name for name, site in sites.items() if site.observed]

    def read(model: Callable, data: Any, log_z: dict[str, Array]) -> dict[str, Array]:
        trace = trace_model(from_base(model), *join_static(data, fit.config.model.static_arguments))
        result = {}
        for name in names:
            fn = trace[name]["fn"]
            with log_normaliser(log_z.get(name, 0.0)):
                value = fn.log_prob(trace[name]["value"])
            result[name] = jnp.broadcast_to(value, jnp.broadcast_shapes(value.shape, fn.batch_shape))
        return result

    dims = {name: sites[name].batch_dims for name in names}
    return _each_draw(fit, chosen, read, dims, rng_key, max_bytes, "log_likelihood")


def predictive(
    fit: Any, chosen: np.ndarray, sites: dict[str, Site], rng_key: Array, max_bytes: int
) -> dict[str, Variable]:
    """The observed sites redrawn for each draw."""
    names = [name for name, site in sites.items() if site.observed]

    def read(model: Callable, data: Any, log_z: dict[str, Array]) -> dict[str, Array]:
        # Unlike from_base this draws energy priors that are observed from the priors themselves.
        trace = trace_model(model, *join_static(data, fit.config.model.static_arguments))
        return {name: trace[name]["value"] for name in names}

    dims = {name: sites[name].dims for name in names}
    return _each_draw(fit, chosen, read, dims, rng_key, max_bytes, "posterior_predictive", redraw=True)


def _each_draw(
    fit: Any,
    chosen: np.ndarray,
    read: Callable,
    dims: dict[str, tuple[str, ...]],
    rng_key: Array,
    max_bytes: int,
    group: str,
    redraw: bool = False,
) -> dict[str, Variable]:
    """``read`` the model at every draw, in blocks of B data if it is subsampled."""
    model, samples = fit.config.model, fit.get_samples(group_by_chain=False)
    missing = [name for name in model.latents if name not in samples]
    if missing:
        raise ValueError(
            f"{group} needs draws of all latents, and {missing} were not collected: run() with sites=None."
        )
    num = fit.num_chains * fit.num_samples

    @jax.jit
    def at_block(batch: Batch, latents: dict[str, Any]) -> dict[str, Array]:
        key_normaliser, key_draws = random.split(batch.rng_key)
        log_z = {} if redraw else _log_normalisers(fit, batch._replace(rng_key=key_normaliser))

        def one(args: tuple[Array, dict]) -> dict[str, Array]:
            key, values = args
            values = {**fit.params, **copy_containers(batch.mutable), **values}
            if batch.indices is not None and model.plate is not None:
                values[model.plate.name] = batch.indices
            placed = handlers.substitute(model.model, data=values)
            seeded = handlers.seed(handlers.uncondition(placed) if redraw else placed, key)
            return read(seeded, batch.data, log_z)

        return lax.map(one, (random.split(key_draws, num), latents))

    blocks = model.blocks(chosen, joint=False)
    shapes = jax.eval_shape(at_block, fit._batch(blocks[0], rng_key), _placed(fit, samples, blocks[0]))
    total = sum(math.prod(s.shape) * s.dtype.itemsize for s in shapes.values()) * len(blocks)
    if total > max_bytes:
        raise ValueError(
            f"{group} would take {total / 2**30:.2g} GiB, above max_bytes ({max_bytes / 2**30:.2g} GiB): "
            "choose fewer indices=…, collect fewer draws, or raise max_bytes."
        )
    parts = []
    for i, block in enumerate(blocks):
        out = at_block(fit._batch(block, random.fold_in(rng_key, i)), _placed(fit, samples, block))
        parts.append(jax.tree.map(np.asarray, out))
    result = {}
    for name, value in parts[0].items():
        names = dims[name][len(dims[name]) - (value.ndim - 1) :]
        if plate_name(fit) in names:
            axis = 1 + names.index(plate_name(fit))
            value = np.concatenate([part[name] for part in parts], axis)
            value = np.take(value, np.arange(len(chosen)) if model.subsampled else chosen, axis)
        result[name] = Variable(value.reshape((fit.num_chains, fit.num_samples, *value.shape[1:])), names)
    return result


def _placed(fit: Any, samples: dict[str, np.ndarray], block: Array | None) -> dict[str, Any]:
    """Latents ``[N · S, ...]`` as the model wants them: of the block's data, or of all of them."""
    model, result = fit.config.model, {}
    for name in model.latents:
        value, axis = samples[name], fit.layout[name].axis
        if axis is not None and block is not None:
            value = np.take(value, positions(fit, np.asarray(block)), axis)
        elif axis is not None and fit.plan.indices is not None:
            value = spread(value, axis, fit.plan.indices, model.num_data)
        result[name] = value
    return result


def _log_normalisers(fit: Any, batch: Batch) -> dict[str, Array]:
    """Log Z of the observed energy priors at the fitted parameters."""
    model = fit.config.model
    if not any(site.observed for site in model.energies.values()):
        return {}
    result = {}
    priors = model.energy_priors(fit.params, batch)
    for i, (name, prior) in enumerate(priors.items()):
        if not model.energies[name].observed:
            continue
        population = anneal(
            random.fold_in(batch.rng_key, i),
            prior.tilted(),
            max(NORMALISER_WALKERS, prior.num_walkers),
            num_moves=prior.num_moves,
            stage_ess=0.9,
            max_temps=prior.max_temps,
            rate=0.2,
        )
        result[name] = population.log_z.reshape(prior.batch_shape)
    return result
