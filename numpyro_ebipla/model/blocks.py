"""Blocks of data, worked off one after the other, and what a run of the model sees of one."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_ebipla._core.static import is_traced

#: Told how many blocks are done, of how many.
Progress = Callable[[int, int], None]
#: For :func:`map_blocks`: one value of each block.
BY_BLOCK = "by block"


class Batch(NamedTuple):
    """What a run of the model sees besides parameters and latents.

    Attributes:
        indices: ``[B]`` the data to visit, None for all of a plate that is not subsampled.
        data: the array arguments of the model.
        rng_key: to draw from, and for models that ask for one.
        mutable: values at ``mutable`` sites.
    """

    indices: Array | None
    data: Any
    rng_key: Array
    mutable: dict[str, Any]


def silent(done: int, of: int) -> None:
    """Tell nobody."""
    del done, of


def split_indices(num_data: int, batch_size: int, wanted: np.ndarray | None) -> Array:
    """Return ``[K, B]`` indices of all data, or of those wanted; the last block is filled up from the front.

    >>> split_indices(5, 2, None).tolist(), split_indices(5, 4, np.array([3, 1])).tolist()
    ([[0, 1], [2, 3], [4, 0]], [[3, 1]])
    """
    num = num_data if wanted is None else len(wanted)
    size = min(batch_size, num)
    order = (jnp.arange(-(-num // size) * size, dtype=jnp.int32) % num).reshape(-1, size)
    return order if wanted is None else jnp.asarray(wanted, jnp.int32)[order]


def map_blocks(
    function: Callable[[Batch], Any], batch: Batch, blocks: Any, axes: Any, chosen: Any, progress: Progress = silent
) -> Any:
    """Apply a function to one block of data after the other, and join what it returns.

    Args:
        function: batch -> tree of arrays.
        batch: what all blocks see; each gets its own ``indices``, and a key derived from this one.
        blocks: ``[K, B]`` indices, or ``[None]``.
        axes: see :meth:`.LatentModel.map_blocks`.
        chosen: what to keep of the joined data axes: a slice, indices, or None for all.
        progress: told how many blocks are done.
    """
    parts = []
    for i, indices in enumerate(blocks):
        part = function(batch._replace(indices=indices, rng_key=random.fold_in(batch.rng_key, i)))
        # Many blocks may not fit into the device's memory.
        parts.append(part if len(blocks) == 1 or is_traced(part) else jax.tree.map(np.asarray, part))
        progress(i + 1, len(blocks))
    xp: Any = jnp if is_traced(parts) else np

    def join(axis: Any, *arrays: Any) -> Any:
        if axis == BY_BLOCK:
            return xp.stack(arrays)
        if axis is None:
            return arrays[0]
        joined = xp.concatenate(arrays, axis) if len(arrays) > 1 else arrays[0]
        if chosen is None or (isinstance(chosen, slice) and chosen.stop >= joined.shape[axis]):
            return joined
        return joined[(slice(None),) * (axis % joined.ndim) + (chosen,)]

    trees = lambda axis, *parts: jax.tree.map(partial(join, axis), *parts)
    return jax.tree.map(trees, axes, *parts, is_leaf=lambda axis: axis is None)
