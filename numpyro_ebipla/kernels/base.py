"""What all transition kernels share: a point, a target, what a move reports, and many moves in a row."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_ebipla._core.state import Adaptation
from numpyro_ebipla._core.tree import PyTree

#: Log density ``[*C]`` and its gradient at positions.
Target = Callable[[PyTree], tuple[Array, PyTree]]
Schedule = Callable[[Array], Array]


class Point(NamedTuple):
    """Chains together with what is known where they stand.

    Attributes:
        position: a tree of arrays ``[*C, *event]``.
        log_density: ``[*C]``, or None if not yet known there.
        gradient: of the log density, like ``position``, or None.
        momentum: like ``position`` for underdamped kernels, else None.
    """

    position: PyTree
    log_density: Array | None
    gradient: PyTree | None
    momentum: PyTree | None = None


class Evaluation(NamedTuple):
    """What is known where chains stand.

    Attributes:
        log_density: ``[*C]``.
        gradient: a tree of ``[*C, *event]``.
    """

    log_density: Array
    gradient: PyTree


class MoveInfo(NamedTuple):
    """What a move reports.

    Attributes:
        accept_prob: mean acceptance probability (one if unadjusted).
        by_datum: ``[B]`` the same by datum, where chains belong to data and the kernel adapts to them; else None.
        secant: tree of ``[*event]``, change of the gradient over change of the position along the proposals, root mean
            squares over chains; None for kernels that do not use it.
        coupling: ``[D/m, m, m]``, see :func:`.estimate_coupling`; None where it is not learned.
    """

    accept_prob: Array
    secant: PyTree | None = None
    by_datum: Array | None = None
    coupling: Array | None = None


def evaluate(target: Target, point: Point) -> Point:
    """Return ``point`` with its log density and gradient filled in, if they are not there."""
    if point.gradient is not None:
        return point
    value, gradient = target(point.position)
    return point._replace(log_density=value, gradient=gradient)


def start(kernel: "AbstractKernel", target: Target, position: PyTree) -> tuple[Point, Adaptation]:
    """Return a point at ``position`` and a fresh adaptation, to use a kernel on its own."""
    value, gradient = target(position)
    chain_ndim = value.ndim
    momentum = jax.tree.map(jnp.zeros_like, position) if kernel.has_momentum else None
    return Point(position, value, gradient, momentum), kernel.init(position, chain_ndim)


class AbstractKernel(ABC):
    """A transition kernel: frozen options, and functions of them.

    Attributes:
        adjusted: whether moves are accepted or refused, so that they leave the target invariant.
        has_momentum: whether a point must have one.
        step_size: the first of them, or all by the number of moves.
    """

    adjusted: ClassVar[bool]
    has_momentum: ClassVar[bool]
    step_size: float | Schedule

    @abstractmethod
    def init(self, position: PyTree, chain_ndim: int) -> Adaptation:
        """Return the adaptation before the first move; ``chain_ndim`` is the number of chain axes."""

    @abstractmethod
    def adapt(self, adapt: Adaptation, info: MoveInfo, point: Point) -> Adaptation:
        """Return the adaptation after a move from ``point`` that reported ``info``."""

    @abstractmethod
    def move(self, rng_key: Array, target: Target, point: Point, adapt: Adaptation) -> tuple[Point, MoveInfo]:
        """Make one transition of every chain."""


def run_moves(
    kernel: AbstractKernel, rng_keys: Array, target: Target, point: Point, adapt: Adaptation
) -> tuple[Point, Adaptation, Array]:
    """Make several moves in a row and adapt to each.

    The first one stands outside the loop, as it may know less or more of its start than the others do.

    Args:
        kernel: of all moves.
        rng_keys: ``[K]``, one for each move.
        target: what the chains move towards.
        point: where they stand.
        adapt: of the kernel.

    Returns:
        The point and the adaptation after them, and the mean acceptance probability.
    """

    def move(carry: tuple[Point, Adaptation], key: Array) -> tuple[tuple[Point, Adaptation], Array]:
        here, adapt = evaluate(target, carry[0]), carry[1]
        there, info = kernel.move(key, target, here, adapt)
        return (there, kernel.adapt(adapt, info, here)), info.accept_prob

    num_moves = rng_keys.shape[0]
    (point, adapt), accept = move((point, adapt), rng_keys[0])
    if num_moves > 1:
        (point, adapt), others = lax.scan(move, (point, adapt), rng_keys[1:])
        accept = (accept + others.sum()) / num_moves
    return point, adapt, accept


def first_adaptation(step_size: float | Schedule, position: PyTree) -> Adaptation:
    """Return an adaptation that has learned nothing but the step size."""
    first = step_size(jnp.zeros((), jnp.int32)) if callable(step_size) else step_size
    return Adaptation(jnp.log(jnp.asarray(first, dtype_of(position))), None, jnp.zeros((), jnp.int32))


def dtype_of(position: PyTree) -> jnp.dtype:
    """Return the type of the chains' numbers."""
    leaves = jax.tree.leaves(position)
    return jnp.result_type(*leaves) if leaves else jnp.result_type(float)
