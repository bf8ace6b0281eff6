"""The first run of a model, which may not run at all: errors that name what is to blame."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from numpyro import handlers

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.static import is_array, join_static, split_static
from numpyro_ebipla.model.arguments import is_column, name_arguments, no_arrays_hint, steps_hint
from numpyro_ebipla.model.handlers import (
    check_loops,
    check_names,
    check_plates,
    check_substituted,
    from_base,
    trace_model,
)

#: JAX's errors where a number of Python is wanted and a traced array found.
NEEDS_A_NUMBER = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.TracerArrayConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def wants_a_number(error: Exception) -> bool:
    """Return whether JAX met a traced array where it wanted a number, or the length of an axis."""
    return isinstance(error, NEEDS_A_NUMBER) or (isinstance(error, TypeError) and "concrete value" in str(error))


def first_trace(model: Callable, rng_key: Array, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the trace of a model that may not run at all with these arguments.

    Raises:
        ModelError: where NumPyro's or JAX's own error would not say what is to blame.
    """
    try:
        sound = check_loops(check_plates(check_names(check_substituted(model))))
        return trace_model(from_base(handlers.seed(sound, rng_key)), args, kwargs)
    except Exception as e:
        columns = any(map(is_column, (*args, *kwargs.values())))  # NumPy's calls in these look like wanting a number
        if isinstance(e, ModelError) or (wants_a_number(e) and not columns):
            raise
        named = name_arguments(model, args, kwargs)
        empty = [n for n, value in named.items() if any(np.size(x) == 0 for x in jax.tree.leaves(value) if is_array(x))]
        if empty:
            raise ModelError(f"argument '{empty[0]}' of the model is empty, and so it cannot be run: {e}.") from e
        if (hint := steps_hint(args)) or (hint := no_arrays_hint(named)):
            raise ModelError(f"the model cannot be run with the arguments given: {e}.{hint}") from e
        raise


def needs_a_number(
    model: Callable, rng_key: Array, args: tuple, kwargs: dict[str, Any], error: Exception
) -> ModelError:
    """Return an error that names the argument whose numbers the model wants to see: without it the others do."""
    arrays, static = split_static((args, kwargs))
    blamed = []
    for i, array in enumerate(arrays):

        def run(others: Any, i: int = i, array: Any = array) -> None:
            args, kwargs = join_static((*others[:i], array, *others[i:]), static)
            trace_model(from_base(handlers.seed(model, rng_key)), args, kwargs)

        try:
            jax.eval_shape(run, arrays[:i] + arrays[i + 1 :])
        except Exception as e:
            if wants_a_number(e):
                continue
        blamed.append(array)
    named = name_arguments(model, args, kwargs)
    names = [
        name for name, value in named.items() if any(x is array for x in jax.tree.leaves(value) for array in blamed)
    ]
    what = f"of argument '{names[0]}'" if names else "of an array argument"
    number = "pass it as one (int(…) or float(…)), then it stays the same in all steps"
    array = "use jax.numpy for what is computed of it, or compute it before and pass the result"
    remedy = f"{number}; or {array}"
    if blamed:
        remedy = number if np.size(blamed[0]) == 1 else array
    said = str(error).splitlines()[0]
    return ModelError(
        f"the model needs the value {what} where only a Python number will do, such as the size of a plate, or NumPy: "
        f"{remedy}. JAX says: {said}"
    )
