"""The model's arguments and parameters as users give them, checked."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.primitives import Messenger

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Params
from numpyro_ebipla._core.static import is_traced
from numpyro_ebipla._core.tree import by_path
from numpyro_ebipla._core.validate import check_trees
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


def without_held(argument: str, params: Params, held: Params) -> Params:
    """Return parameters but for those that are held, which may be among them, at their values.

    Raises:
        ModelError: naming one that is given another value.
    """
    for name in params.keys() & held.keys():
        given = like_own(argument, {name: params[name]}, held)[name]
        pairs = zip(jax.tree.leaves(given), jax.tree.leaves(held[name]), strict=True)
        if not all(is_traced(a) or np.array_equal(a, b) for a, b in pairs):
            raise ModelError(f"{argument}: '{name}' has another value than EBIPLA(…, hold=…) holds it at.")
    return {name: value for name, value in params.items() if name not in held}


def as_arrays(argument: str, params: Params | None) -> Params:
    """Return parameters that a user gives as trees of arrays.

    Raises:
        TypeError: naming what is not an array.
    """
    if not isinstance(params, dict | None):
        raise TypeError(f"{argument} must be {{name: value}}, got {type(params).__name__}.")
    arrays = {}
    for name, value in (params or {}).items():
        try:  # JAX would read a word as the name of a type
            arrays[name] = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) if isinstance(x, str) else x), value)
        except (TypeError, ValueError) as e:
            raise TypeError(
                f"{argument}: the value of '{name}' must be an array, or a tree of arrays, got {value!r}."
            ) from e
    return arrays


def _is_nan_masked(model: Callable) -> bool:
    """Return whether one of the handlers around a model takes NaN out."""
    while isinstance(model, Messenger):
        if isinstance(model, nan_masked):
            return True
        model = model.fn
    return False


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
    if _is_nan_masked(model):
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


def steps_hint(args: tuple) -> str:
    """Return what to say where the first argument may be meant as the number of steps, as in ``SVI.run``."""
    if len(args) < 2 or type(args[0]) is not int:
        return ""
    return (
        f" Is {args[0]} the number of steps? That is run(rng_key, …, num_steps={args[0]}): arguments are the model's."
    )


def is_column(x: Any) -> bool:
    """Return whether it is a column or a table, as of pandas: an array to NumPy, and none to JAX."""
    return hasattr(x, "to_numpy")


def no_arrays_hint(named: dict[str, Any]) -> str:
    """Return what to say of arguments that look like arrays to a user, and are none to JAX."""
    for name, value in named.items():
        numbers = (
            isinstance(value, list) and value and all(isinstance(x, bool | int | float | np.number) for x in value)
        )
        if numbers or is_column(value):
            return f" Argument '{name}' is a {type(value).__name__}, and no array: pass numpy.asarray({name})."
    return ""


def check_whole(model: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise for iterators and data loaders, which JAX would not look into, and for what has no order.

    Raises:
        ModelError: naming the argument.
    """
    check_trees(args, kwargs)
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
        raise ModelError(f"the model cannot be called with the arguments given: {e}.{steps_hint(args)}") from e
    except ValueError:  # no signature, e.g. a callable from C
        return {**{str(i): x for i, x in enumerate(args)}, **kwargs}
