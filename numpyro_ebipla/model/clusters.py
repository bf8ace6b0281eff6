"""The log density by clusters of data, such as the patients of visits: what robust covariances sum over."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_ebipla._core.state import Params, Sites
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.handlers import site_log_prob
from numpyro_ebipla.model.latent_model import LatentModel

#: ``{plate: [size] the cluster of each of its elements}``.
Labels = dict[str, Array]


def log_density_by_cluster(
    model: LatentModel, number: int, params: Params, local: Sites, shared: Sites, batch: Batch, labels: Labels
) -> Array:
    """Return log densities of one particle ``[K + 1]``, by cluster and of the sites that belong to none.

    Args:
        model: the model.
        number: K.
        params: constrained.
        local: ``{site: [B, *event]}``, unconstrained.
        shared: ``{site: [*event]}``.
        batch: data to visit.
        labels: a site belongs to the first of its plates that is among these.
    """
    trace, log_det = model.trace(params, local, shared, batch)
    inside, rest = jnp.zeros(number), jnp.zeros(())
    for name, site in trace.items():
        if site["type"] != "sample":
            continue
        value = site_log_prob(site, log_det.get(name), jnp.zeros(()))
        frame = frame_of(site, labels)
        if frame is None:
            rest += value.sum()
        else:
            value = jnp.moveaxis(value, frame.dim, 0)
            value = value.reshape(value.shape[0], -1).sum(-1)
            inside += jax.ops.segment_sum(value, labels[frame.name], number)
    return jnp.append(inside, rest)


def frame_of(site: dict[str, Any], labels: dict[str, Any]) -> Any:
    """Return the plate by which a site of a trace belongs to clusters, or None."""
    return next((frame for frame in site["cond_indep_stack"] if frame.name in labels), None)
