"""The model's arguments and parameters as users give them, checked."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Params
from numpyro_ebipla._core.tree import by_path
from numpyro_ebipla.model.missing import nan_masked


def like_own(argument: str, given: Params, own: Params) -> Params:
    """Return parameters in the structures and types of the model's own, which may be shapes only.

    Raises:
        ModelError: naming the argument and a parameter that the model does not have, or has in other shapes.
    """
    found = {}
    for name, value in given.items():
        if name not in own:
            raise ModelError(f"{argument}: the model has no parameter '{name}'; it has {sorted(own)}.")
        ours, theirs = by_path(own[name]), by_path(value)
        wanted, shapes = (jax.tree.map(jnp.shape, leaves) for leaves in (ours, theirs))
        if wanted != shapes:
            raise ModelError(
                f"{argument}: '{name}' has shape {shapes.get('', shapes)}, but the model's {wanted.get('', wanted)}."
            )
        leaves = [jnp.asarray(theirs[path], jnp.result_type(like)) for path, like in ours.items()]
        found[name] = jax.tree.unflatten(jax.tree.structure(own[name]), leaves)
    return found


def as_arrays(init_params: Params | None) -> Params:
    """Return initial parameters as trees of arrays.

    Raises:
        TypeError: naming what is not an array.
    """
    if not isinstance(init_params, dict | None):
        raise TypeError(f"init_params must be {{name: value}}, got {type(init_params).__name__}.")
    arrays = {}
    for name, value in (init_params or {}).items():
        try:  # JAX would read a word as the name of a type
            arrays[name] = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) if isinstance(x, str) else x), value)
        except (TypeError, ValueError) as e:
            raise TypeError(
                f"init_params: the value of '{name}' must be an array, or a tree of arrays, got {value!r}."
            ) from e
    return arrays


def check_arguments(model: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise for NaN, masked arrays and arguments that do not fit the model.

    Raises:
        ModelError: naming the argument.
    """
    bound = name_arguments(model, args, kwargs)
    for name, value in bound.items():
        if any(isinstance(leaf, np.ma.MaskedArray) for leaf in jax.tree.leaves(value)):
            raise ModelError(
                f"argument '{name}' of the model is a masked array of NumPy, whose mask JAX would not see: pass "
                f"{name}.filled(np.nan) and wrap the model in nan_masked, or remove these data."
            )
    if isinstance(model, nan_masked):
        bound = {}
    for name, value in bound.items():
        for leaf in jax.tree.leaves(value):
            number = isinstance(leaf, float) or (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact))
            if not number:
                continue
            if bool(np.isnan(np.asarray(leaf)).any()):
                raise ModelError(
                    f"argument '{name}' of the model contains NaN: remove these data, or replace "
                    "them and hide them with numpyro.handlers.mask, or wrap the model in nan_masked."
                )


def check_whole(model: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise for iterators and data loaders, which JAX would not look into.

    Raises:
        ModelError: naming the argument.
    """
    given = (args, kwargs)
    if not any(map(_gives_in_turn, jax.tree.leaves(given, is_leaf=_gives_in_turn))):
        return
    for name, value in name_arguments(model, args, kwargs).items():
        if found := [x for x in jax.tree.leaves(value, is_leaf=_gives_in_turn) if _gives_in_turn(x)]:
            kind = "an iterator" if isinstance(found[0], Iterator) else "a loader"
            raise ModelError(
                f"argument '{name}' of the model is {kind} ({type(found[0]).__name__}), but every datum has particles "
                "of its own: pass all data as one array (uint8 images are fine), of which "
                "numpyro.plate(…, subsample_size=…) draws the minibatches. For more data than fit into memory use SVI."
            )


def _gives_in_turn(x: Any) -> bool:
    """Return whether it is an iterator, or a loader: something to iterate over that has no elements or values."""
    loader = isinstance(x, Iterable) and not isinstance(x, Set) and not hasattr(x, "__getitem__")
    return isinstance(x, Iterator) or (loader and not hasattr(x, "__array__"))


def name_arguments(model: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by their names.

    Raises:
        ModelError: if they are not those of the model.
    """
    try:
        return inspect.signature(model).bind(*args, **kwargs).arguments
    except TypeError as e:
        raise ModelError(f"the model cannot be called with the arguments given: {e}.") from e
    except ValueError:  # no signature, e.g. a callable from C
        return {**{str(i): x for i, x in enumerate(args)}, **kwargs}
