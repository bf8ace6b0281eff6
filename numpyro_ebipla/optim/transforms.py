"""Transformations of gradients that optax lacks, each of one idea, to be chained with optax's own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

#: Added to norms, so that zero stays zero. Below any gradient that is not rounding of zero, yet a normal float32.
TINY = 1e-30


def in_single_precision(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run a transformation in at least single precision, and return updates in the gradients' own.

    Half floats end at 65504 and have eleven bits at most: squares of gradients overflow, and moments that change by a
    thousandth per step do not change at all.

    Args:
        inner: the transformation; its state and what it computes are float32 where gradients are half floats.
    """
    inner = optax.with_extra_args_support(inner)

    def widened(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)

    def init(params: Any) -> Any:
        return inner.init(widened(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        wide, state = inner.update(widened(updates), state, widened(params), **extra)
        return optax.tree.cast_like(wide, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


class CappedAdamState(NamedTuple):
    """Number of updates, mean of the gradients, and means of their squares over long and over the last few."""

    count: Array  # type: ignore[assignment]
    mean: Any
    square: Any
    recent: Any


#: Decay of the short memory of squares: about the last dozen of gradients.
RECENT_DECAY = 0.9
#: Largest ratio of the second moment to that of the last dozen. For normal gradients of one size it binds once in about
#: 20000 steps, so that it changes nothing there; where gradients fall to less than half, their scale has changed.
CAP = 4.0


def scale_by_capped_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Rescale gradients by Adam (Kingma and Ba, 2015) with a second moment that forgets large gradients soon.

    Gradients at the start of a fit may be larger by orders of magnitude than later ones (variances that begin too
    small), and Adam's second moment remembers them for thousands of steps. Here it is at most :data:`CAP` times that
    of the last dozen gradients.

    Args:
        b1: decay of the mean.
        b2: decay of the second moment.
        eps: added to the root of the second moment: gradients far below it do not move a parameter.
    """

    def init(params: Any) -> CappedAdamState:
        zeros = optax.tree.zeros_like(params)
        return CappedAdamState(jnp.zeros((), jnp.int32), zeros, zeros, zeros)

    def update(updates: Any, state: CappedAdamState, params: Any = None) -> tuple[Any, CappedAdamState]:
        del params
        count = optax.safe_increment(state.count)
        mean = optax.tree.update_moment(updates, state.mean, b1, 1)
        square = optax.tree.update_moment(updates, state.square, b2, 2)
        recent = optax.tree.update_moment(updates, state.recent, RECENT_DECAY, 2)
        updates = jax.tree.map(
            lambda m, v, r: m / (jnp.sqrt(jnp.minimum(v, CAP * r)) + eps),
            optax.tree.bias_correction(mean, b1, count),
            optax.tree.bias_correction(square, b2, count),
            optax.tree.bias_correction(recent, RECENT_DECAY, count),
        )
        return updates, CappedAdamState(count, mean, square, recent)

    return optax.GradientTransformation(init, update)


class NesterovState(NamedTuple):
    """Number of updates and mean of the gradients."""

    count: Array  # type: ignore[assignment]
    mean: Any


def nesterov_mean(decay: float) -> optax.GradientTransformation:
    """Replace gradients by their mean, corrected for its start at zero and moved on by the last one (Nesterov, 1983).

    The mean of :func:`optax.contrib.scale_by_muon` corrects gradients and mean by counts one step apart, and so gives
    the last gradient up to half its weight again in the first twenty steps; this one is a weighted mean throughout.

    Args:
        decay: of the mean.
    """

    def init(params: Any) -> NesterovState:
        return NesterovState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(updates: Any, state: NesterovState, params: Any = None) -> tuple[Any, NesterovState]:
        del params
        count = optax.safe_increment(state.count)
        mean = optax.tree.update_moment(updates, state.mean, decay, 1)
        ahead = optax.tree.update_moment(updates, optax.tree.bias_correction(mean, decay, count), decay, 1)
        return ahead, NesterovState(count, mean)

    return optax.GradientTransformation(init, update)


#: Coefficients of ``a x + b x³ + c x⁵`` on singular values, and how often it is taken (Jordan et al., 2024): those of a
#: matrix of norm one that are above 0.01 come between 0.68 and 1.14.
NEWTON_SCHULZ, NUM_ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def orthogonalised(matrix: Array) -> Array:
    """Return ``[m, n]`` with its singular vectors and all singular values near one, by Newton–Schulz iterations."""
    a, b, c = NEWTON_SCHULZ
    x = matrix / (jnp.linalg.norm(matrix) + TINY)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def orthogonalise() -> optax.GradientTransformation:
    """Replace matrices by :func:`orthogonalised` ones (Muon; Jordan et al., 2024).

    :func:`optax.contrib.scale_by_muon` does so together with a mean of its own and, in some releases only, a factor for
    the shape; see :func:`nesterov_mean` and :func:`scale_by_width`.
    """
    return optax.stateless(lambda updates, params: jax.tree.map(orthogonalised, updates))


def scale_by_width() -> optax.GradientTransformation:
    """Scale matrices ``[m, n]`` by ``√max(1, n/m)``, so that orthogonal ones change outputs alike for any width.

    An orthogonal matrix then has entries of root mean square ``1/√m``: each of ``m`` inputs of size one moves each
    output by that, at random. (Jordan et al., 2024; :func:`optax.contrib.muon` has the same factor.)
    """

    def update(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(lambda u: max(1.0, u.shape[1] / u.shape[0]) ** 0.5 * u, updates)

    return optax.stateless(update)


#: Inputs of a unit up to which steps are left alone: networks of this width train at Adam's rates as they are.
NARROW = 128


def fan_in(weights: Array) -> Array:
    """Return about how many inputs a unit has, by the size of its weights ``[…, n]``; one for vectors and scalars.

    Initialisers make weights of mean square ``1/m`` for ``m`` inputs, whichever axis these are on. Smaller weights, and
    zeros, count as if all axes but the last were the inputs'.
    """
    if weights.ndim < 2:
        return jnp.ones((), weights.dtype)
    most = weights.size // weights.shape[-1]
    return jnp.clip(1 / (jnp.mean(jnp.square(weights)) + TINY), 1.0, most)


def fan_in_factor(weights: Array) -> Array:
    """Return the factor of :func:`scale_by_fan_in` for one array."""
    return jnp.minimum(NARROW / fan_in(weights), 1.0)


def scale_by_fan_in() -> optax.GradientTransformation:
    """Scale the steps of wide networks' weights by ``128 / m`` for ``m`` inputs of a unit, if there are more than 128.

    Steps of one size in all weights, as Adam's are at the start, move a unit with ``m`` inputs by ``m`` times as much,
    if all point the same way: a generator with a tanh or logistic output is saturated after three of them, and its
    gradient gone. (Yang et al., 2021, *Tensor Programs V*, have the same factor for Adam.)
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("scale_by_fan_in reads the weights: call update(grads, state, params).")
        return jax.tree.map(lambda u, p: fan_in_factor(p) * u, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
