"""Observed values: censored ones whose bounds are the edges of the support, and those that no distribution can have."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.primitives import Messenger

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.static import is_array

LEFT, RIGHT = dist.LeftCensoredDistribution, dist.RightCensoredDistribution
INTERVAL = dist.IntervalCensoredDistribution
WRAPPERS = (dist.ExpandedDistribution, dist.MaskedDistribution, dist.Independent)


class censored_at_edges(Messenger):
    """Take censored observations that are bounded by an edge of the support for what they say.

    An interval that begins where the support begins is censored on the left, and one that ends where it ends on the
    right. What then has no bound says nothing, and is masked. NumPyro's log densities are right without that, but
    their gradients are NaN.
    """

    def process_message(self, msg: dict[str, Any]) -> None:
        """Rewrite an observed site."""
        if msg["type"] == "sample" and msg["is_observed"] and isinstance(_inner(msg["fn"]), LEFT | RIGHT | INTERVAL):
            msg["fn"], msg["value"] = _rewritten(msg["fn"], jnp.asarray(msg["value"]))


def _inner(fn: Any) -> Any:
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


def _rewritten(fn: Any, value: Array) -> tuple[Any, Array]:
    """Return a distribution and a value of the same density, whose gradient is finite."""
    if isinstance(fn, WRAPPERS):
        inner, value = _rewritten(fn.base_dist, value)
        if isinstance(fn, dist.MaskedDistribution):
            return inner.mask(fn._mask), value
        if isinstance(fn, dist.Independent):
            return inner.to_event(fn.reinterpreted_batch_ndims), value
        return inner.expand(fn.batch_shape), value
    support = fn.base_dist.support
    least, most = getattr(support, "lower_bound", -jnp.inf), getattr(support, "upper_bound", jnp.inf)
    begins, ends = (lambda x: (x == -jnp.inf) | (x == least)), (lambda x: (x == jnp.inf) | (x == most))
    inside = support.feasible_like(value[..., 0] if isinstance(fn, INTERVAL) else value)
    if not isinstance(fn, INTERVAL):
        silent = fn.censored & (begins(value) if isinstance(fn, RIGHT) else ends(value))
        return fn.mask(~silent), jnp.where(silent, inside, value)
    lower, upper = value[..., 0], value[..., 1]
    outwards = fn.left_censored & fn.right_censored  # both: the value lies outside of the interval
    left, right = fn.left_censored | begins(lower), fn.right_censored | ends(upper)
    silent = left & right & ~outwards
    lower = jnp.where(left & ~outwards, inside, lower)
    upper = jnp.where(right & ~outwards, inside, upper)
    fn = INTERVAL(fn.base_dist, left, right & ~silent)
    return fn.mask(~silent), jnp.stack(jnp.broadcast_arrays(lower, upper), -1)


def is_missing(site: dict[str, Any]) -> Array:
    """Return whether an observation is NaN; masked ones do not count."""
    value, event_dim = jnp.asarray(site["value"]), _inner(site["fn"]).event_dim
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return jnp.zeros((), bool)
    known = ~jnp.isnan(value).any(tuple(range(-min(event_dim, value.ndim), 0)))
    return ~jnp.all(_sound(site["fn"], known))


def is_outside(site: dict[str, Any]) -> Array:
    """Return whether an observation lies outside a continuous support; masked ones do not count."""
    base = _inner(site["fn"])
    try:
        support = base.support
    except NotImplementedError:
        return jnp.zeros((), bool)
    if support is None or support.is_discrete:  # fractions at a Bernoulli site are common use
        return jnp.zeros((), bool)
    inside = support(site["value"])
    if isinstance(base, INTERVAL):
        between = ~(base.left_censored ^ base.right_censored)
        inside = inside.all(-1) & ((site["value"][..., 0] <= site["value"][..., 1]) | ~between)
    return ~jnp.all(_sound(site["fn"], inside))


def _sound(fn: Any, sound: Array) -> Array:
    """Return which elements are sound or masked, from those that are sound to the distribution inside."""
    if isinstance(fn, dist.MaskedDistribution):
        return _sound(fn.base_dist, sound) | ~jnp.asarray(fn._mask)
    if isinstance(fn, dist.Independent):
        inner = _sound(fn.base_dist, sound)
        return inner.all(tuple(range(-min(fn.reinterpreted_batch_ndims, inner.ndim), 0)))
    if isinstance(fn, dist.ExpandedDistribution):
        return _sound(fn.base_dist, sound)
    return sound


def check_numbers(name: str, value: Any) -> None:
    """Raise for an observation that is not made of real numbers.

    Raises:
        ModelError: naming the site.
    """
    if not isinstance(value, int | float | np.number | np.bool_) and not is_array(value):
        kind, remedy = f"a {type(value).__name__}", "pass jnp.asarray(…)"
        if isinstance(value, np.ndarray):
            kind, remedy = f"of NumPy's type {value.dtype}", "make numbers of them first"
        raise ModelError(f"observed values at '{name}' are {kind}, not an array of numbers: {remedy}.")
    if jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
        raise ModelError(f"observed values at '{name}' are complex: pass real and imaginary parts.")
