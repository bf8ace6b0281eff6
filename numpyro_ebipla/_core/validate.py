"""Checks of keys, arguments and options, refused by name where they are given."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.static import constants_are_traced, is_array, is_traced

#: Keys without a type, by their shape: the generator that they are of, unless JAX's default has that shape, too.
_LEGACY = {(2,): "threefry2x32", (4,): "rbg"}


def check_key(rng_key: Any) -> Array:
    """Return a typed key from a typed or a raw one."""
    if is_array(rng_key):
        if jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key) and rng_key.shape == ():
            return rng_key
        impl = _LEGACY.get(rng_key.shape)
        if rng_key.dtype == jnp.uint32 and impl is not None:
            default = jax.eval_shape(lambda: random.key_data(random.key(0)))
            return random.wrap_key_data(jnp.asarray(rng_key), impl=None if default.shape == rng_key.shape else impl)
    raise TypeError(f"rng_key must be a PRNG key such as jax.random.key(0), got {rng_key!r}.")


def check_trees(*values: Any) -> None:
    """Raise for dictionaries with keys that do not compare, whose order JAX does not know.

    Raises:
        ModelError: with the keys.
    """
    try:
        jax.tree.structure(values, is_leaf=lambda x: isinstance(x, Iterator))  # of which JAX warns
    except (TypeError, ValueError) as e:
        keys = next((list(keys) for keys in _keys(values) if len({type(key) for key in keys}) > 1), None)
        if keys is None:
            raise
        raise ModelError(
            f"an argument of the model is a dictionary with keys of several types, {keys}, which have no order: make "
            "words of them all."
        ) from e


def _keys(tree: Any) -> Iterator[Any]:
    """Yield the keys of all dictionaries among built-in containers."""
    if isinstance(tree, dict):
        yield tree.keys()
    for x in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ():
        yield from _keys(x)


def check_untraced(method: str, *values: Any) -> None:
    """Raise where there are no numbers to look at.

    Raises:
        ModelError: naming the method.
    """
    check_trees(*values)
    if constants_are_traced() or is_traced(values):
        raise ModelError(
            f"{method} looks at its numbers as it goes, and there are none inside jit, vmap or grad: call it outside. "
            "update, evaluate, log_likelihood, anomaly_score and reconstruct may be called inside."
        )


def accepts(model: Callable, name: str) -> bool:
    """Return whether a model takes a keyword argument of this name."""
    try:
        theirs = inspect.signature(model).parameters
    except ValueError:  # no signature, e.g. a callable from C
        return True
    return name in theirs or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in theirs.values())


#: Options of SVI and MCMC, and what is said of them here.
OF_OTHERS = {
    "guide": "particles stand for the posteriors; EBIPLA(model, guide=…) lets them begin at the draws of a guide",
    "loss": "there is no ELBO; the gradient is that of the log marginal likelihood",
    "stable_update": "a step that would leave the finite numbers is never taken",
    "num_warmup": "did you mean warmup, the moves before the draws that a run collects",
    "num_chains": "did you mean num_particles, each of which is a chain",
    "step_size": "a rate of the parameters goes to optim=, a step of the particles to kernel=",
    "learning_rate": "pass it to an optimiser, such as optim=optax.adam(1e-3)",
    "lr": "pass it to an optimiser, such as optim=optax.adam(1e-3)",
}


def check_spelling(model: Callable, method: Callable, names: Iterable[str], owner: str) -> None:
    """Raise for keyword arguments that are neither the method's nor the model's, with the name that was meant, maybe.

    Raises:
        TypeError: naming the argument.
    """
    own = inspect.signature(method).parameters
    for name in names:
        if accepts(model, name):
            continue
        meant = difflib.get_close_matches(name, own, 1)
        hint = f": did you mean {meant[0]}?" if meant else "."
        if name in OF_OTHERS:
            hint = f": {OF_OTHERS[name]}."
        raise TypeError(f"{owner} has no option '{name}', and the model takes no argument of that name{hint}")


def check_options(model: Callable, method: Callable, options: dict[str, Any]) -> None:
    """Raise for options of a method that are given, where the model has arguments of their names and might be meant.

    Raises:
        ModelError: naming the option.
    """
    try:
        theirs = inspect.signature(model).parameters
    except ValueError:  # no signature, e.g. a callable from C
        return
    own = inspect.signature(method).parameters
    for name, value in options.items():
        if name in theirs and value is not own[name].default:
            raise ModelError(
                f"'{name}' is an option of {method.__name__}, and so cannot be passed on to the model, which has an "
                "argument of that name: rename the model's."
            )


def as_count(name: str, value: Any, least: int = 1) -> int:
    """Return ``value`` as an integer of at least ``least``, or raise a ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
    return int(value)


def check_counts(options: Any, *names: str) -> None:
    """Raise unless attributes are integers of at least one."""
    for name in names:
        as_count(f"{type(options).__name__}: {name}", getattr(options, name))


def check_within(name: str, value: Any, above: float = 0.0, below: float = np.inf) -> None:
    """Raise unless ``value`` is a number between two bounds; a schedule (a function) passes.

    Raises:
        ValueError: naming it.
    """
    if not callable(value):
        bounds = f"above {above:g}" if np.isinf(below) else f"between {above:g} and {below:g}"
        check_scalar(name, value, lambda x: above < x < below, f"a number {bounds}")


def check_scalar(name: str, value: Any, sound: Callable[[Any], Any], wanted: str) -> None:
    """Raise unless ``value`` is a number, and ``sound``.

    Raises:
        ValueError: naming it, and what is wanted.
    """
    a_number = isinstance(value, int | float | np.number | np.ndarray | jax.Array) and not isinstance(value, bool)
    if not (a_number and np.ndim(value) == 0 and sound(value)):
        raise ValueError(f"{name} must be {wanted}, got {value!r}.")


def as_site_names(name: str, value: Any) -> tuple[str, ...]:
    """Return names of sites; a lone string is one.

    Raises:
        TypeError: naming the argument.

    >>> as_site_names("sites", "latent")
    ('latent',)
    """
    if isinstance(value, str):
        return (value,)
    found = tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(x, str) for x in found):
        raise TypeError(f'{name} must be names of sites, such as ["x"], got {value!r}.')
    return found


def check_number(options: Any, name: str, below: float = np.inf) -> None:
    """Raise unless an attribute is a number between two bounds, or a schedule."""
    check_within(f"{type(options).__name__}: {name}", getattr(options, name), below=below)


def check_share(options: Any, name: str) -> None:
    """Raise unless an attribute is a number from 0 to 1.

    Raises:
        ValueError: naming it.
    """
    value = getattr(options, name)
    if not 0 <= value <= 1:
        raise ValueError(f"{type(options).__name__}: {name} must lie between 0 and 1, got {value!r}.")


def check_type(options: Any, name: str, kind: type, examples: str) -> None:
    """Raise unless an attribute is of a type.

    Raises:
        TypeError: naming it.
    """
    value = getattr(options, name)
    if not isinstance(value, kind):
        raise TypeError(f"{type(options).__name__}: {name} must be {examples}, got {value!r}.")
