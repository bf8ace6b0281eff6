"""Shapes and data axes of the values at latent and deterministic sites."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, random
from numpyro.ops.provenance import eval_provenance

from numpyro_ebipla._core.state import Params, Sites
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.latent_model import LatentModel


class SiteLayout(NamedTuple):
    """Shape and type of one particle's value at a site, and its data axis from the right (None if global)."""

    shape: tuple[int, ...]
    dtype: Any
    axis: int | None


def lay_out_values(model: LatentModel, sites: Sequence[str], params: Params, batch: Batch) -> dict[str, SiteLayout]:
    """Return how the values at latent and deterministic sites are laid out, and the means at observed ones.

    Sites of other than arrays are left out. The data axis of a site that is not latent is the one whose length follows
    that of the minibatch. Of the parameters, which are unconstrained, only the shapes matter.
    """

    def shapes(width: int) -> dict[str, jax.ShapeDtypeStruct]:
        def values(key: Array) -> dict[str, Array]:
            constrained = model.constrain_params(params)
            indices = jnp.arange(width, dtype=jnp.int32) if model.subsampled else None
            at = batch._replace(indices=indices, rng_key=key)
            local, shared = jax.tree.map(lambda x: x[None], model.draw_latents(constrained, at))
            return model.expected(constrained, local, shared, at, sites)

        found = jax.eval_shape(values, random.key(0))
        return {name: found[name] for name in sites if isinstance(found[name], jax.ShapeDtypeStruct)}

    here = shapes(model.batch_size) if sites else {}
    ask = model.subsampled and any(name not in model.latents for name in sites)
    wider = shapes(model.batch_size + 1) if ask else here
    result = {}
    for name, value in here.items():
        shape = value.shape[1:]
        grown = [i - len(shape) for i, (a, b) in enumerate(zip(shape, wider[name].shape[1:], strict=True)) if a != b]
        axis = grown[0] if grown else None
        if name in model.latents:
            axis = model.latents[name].value_axis if model.latents[name].local else None
        result[name] = SiteLayout(shape, value.dtype, axis)
    return result


def of_minibatches(model: LatentModel, layout: dict[str, SiteLayout], params: Params, batch: Batch) -> set[str]:
    """Return the sites that have no data axis and differ from block to block, and so are of no datum and not of all."""
    whole = tuple(name for name, site in layout.items() if site.axis is None and name not in model.latents)
    if not whole or not model.subsampled or model.global_sites:  # which make one block of all data
        return set()
    params = model.constrain_params(params)
    batch = batch._replace(indices=jnp.arange(model.batch_size, dtype=jnp.int32))

    def values(local: Sites, indices: Array) -> dict[str, Array]:
        one = jax.tree.map(lambda x: x[None], local)
        return model.values(params, one, {}, batch._replace(indices=indices), whole)

    local, _ = jax.eval_shape(lambda: model.draw_latents(params, batch))
    return {name for name, sources in eval_provenance(values, local=local, indices=batch.indices).items() if sources}
