"""The Metropolis-adjusted Langevin kernel, which adapts its step sizes, scales and coupling of coordinates."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_ebipla._core.few import FEW, as_groups
from numpyro_ebipla._core.state import Adaptation, DatumSteps
from numpyro_ebipla._core.tree import PyTree, chain_select
from numpyro_ebipla._core.validate import check_number
from numpyro_ebipla.kernels.base import AbstractKernel, MoveInfo, Point, Target, dtype_of, evaluate, first_adaptation
from numpyro_ebipla.kernels.metropolis import (
    Here,
    Proposal,
    Shape,
    estimate_coupling,
    invert,
    learn_coupling,
    metropolis,
)

#: Coordinates of a chain up to which their coupling is learned, where chains belong to data and where they are few:
#: beyond, its matrices would cost more than they save.
MAX_COUPLED, MAX_COUPLED_FEW = 32, 128
#: Rate, over the root of the number of moves, at which the log step size follows the acceptance (Robbins and Monro,
#: 1951): large at first, as the first step size may be off by more than a factor of ten.
STEP_RATE = 0.5
#: Below this the rate does not fall, as the target moves with the parameters.
LEAST_STEP_RATE = 0.02
#: Scales and coupling are running means of about the last hundred moves at most, for the same reason.
LEAST_SHAPE_RATE = 0.01
#: A mean squared gradient this many times below its running mean is not noise: of four chains one in 1e13 is. The
#: particles have left a place where the likelihood was steep beyond measure, and the mean would forget it in thousands
#: of moves.
ELSEWHERE = 1e-6
#: Moves for which the identity counts in the mean coupling, so that a single move of few chains does not replace it.
COUPLING_DELAY = 10


@final
@dataclass(frozen=True)
class MALA(AbstractKernel):
    """Metropolis-adjusted Langevin, accepted per chain, with its step size and scales adapted.

    The step size follows ``log h += ρ_k (acceptance − target_accept)``; the scale of each coordinate is
    the inverse square root of its mean squared gradient over chains and time, which is the diagonal of
    the Fisher information of the target (Titsias, 2023, *Optimal preconditioning and Fisher adaptive
    Langevin sampling*). Chains that start many standard deviations out have gradients that say how far they
    are, not how curved the target is, and scales from these would hold them there; there the change of the
    gradient along the proposals is the smaller of the two and is taken instead. Scales are shared by all chains of
    the family, and so is the step, but where chains belong to data, with a factor of its own for each datum: some
    posteriors are much narrower than others. The coordinates of a chain, of all its sites, are decorrelated as well, if
    they are at most 32 (128 where chains do not belong to data), by the mean curvature along the proposals: see
    :func:`.estimate_coupling`. Of more than 128, those of each group are, such as the intercept and the slope of each
    of hundreds of patients.

    Args:
        step_size: the first ``h`` (in units of the scales, so of order one whatever the data).
        target_accept: acceptance that the step size is driven to.
        precondition: whether the scales are adapted; ones if not.
        adapt_step: whether the step size is adapted.
    """

    step_size: float = 0.2
    target_accept: float = 0.65
    precondition: bool = True
    adapt_step: bool = True
    adjusted: ClassVar[bool] = True
    has_momentum: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number(self, "step_size")
        check_number(self, "target_accept", below=1.0)

    def init(self, position: PyTree, chain_ndim: int) -> Adaptation:
        """Return the first step size, scales of one, and no coupling."""
        adapt = first_adaptation(self.step_size, position)
        leaves = jax.tree.leaves(position)
        if self.adapt_step and chain_ndim == 2 and leaves:
            num_data = leaves[0].shape[1]
            steps = DatumSteps(jnp.zeros(num_data, adapt.log_step.dtype), jnp.zeros(num_data, jnp.int32))
            adapt = adapt._replace(by_datum=steps)
        if not self.precondition:
            return adapt
        ones = jax.tree.map(lambda x: jnp.ones(x.shape[chain_ndim:], x.dtype), position)
        blocks, size = _coupled([x.shape for x in jax.tree.leaves(ones)], chain_ndim)
        wide = jnp.promote_types(dtype_of(position), jnp.float32)  # there is no factorisation of half floats
        factor = jnp.tile(jnp.eye(size, dtype=wide), (blocks, 1, 1)) if size > 1 else None
        return adapt._replace(curvature=ones, coupling=factor)

    def adapt(self, adapt: Adaptation, info: MoveInfo, point: Point) -> Adaptation:
        """Drive the step size to its acceptance, and learn scales and coupling."""
        k = adapt.count.astype(adapt.log_step.dtype)
        log_step, curvature, by_datum, coupling = adapt.log_step, adapt.curvature, adapt.by_datum, adapt.coupling
        if self.adapt_step:
            rate = jnp.maximum(STEP_RATE / (1 + k) ** 0.5, LEAST_STEP_RATE)
            log_step = log_step + rate * (info.accept_prob - self.target_accept)
        if self.precondition:
            rate = jnp.maximum(1 / (1 + k), LEAST_SHAPE_RATE)
            curvature = jax.tree.map(
                lambda c, g, s: _update_mean(c, g, s, rate), curvature, point.gradient, info.secant
            )
        if coupling is not None and info.coupling is not None:
            coupling = learn_coupling(coupling, info.coupling, jnp.maximum(1 / (COUPLING_DELAY + k), LEAST_SHAPE_RATE))
        if by_datum is not None and info.by_datum is not None:
            rate = STEP_RATE / (1 + by_datum.count) ** 0.5  # it vanishes: few chains adapt it to themselves
            steps = by_datum.log_step + rate * (info.by_datum - info.accept_prob)
            by_datum = DatumSteps(steps.astype(log_step.dtype), by_datum.count + 1)
        return Adaptation(log_step, curvature, adapt.count + 1, by_datum, coupling)

    def move(self, rng_key: Array, target: Target, point: Point, adapt: Adaptation) -> tuple[Point, MoveInfo]:
        """Propose a step of every chain, and accept or refuse it."""
        position, log_density, gradient, _ = evaluate(target, point)
        assert log_density is not None
        here = Here(position, log_density, gradient)
        shape = proposal_shape(adapt, position)
        accept, new, prob = metropolis(rng_key, lambda x: (*target(x), ()), here, jnp.exp(adapt.log_step), shape)
        secant = None if adapt.curvature is None else _secants(gradient, new, shape, adapt.curvature)
        coupling = None if adapt.coupling is None else estimate_coupling(new, adapt.coupling)
        by_datum = None if adapt.by_datum is None else prob.mean(0)
        there = chain_select(accept, Here(new.position, new.log_density, new.gradient), here)
        return Point(*there), MoveInfo(prob.mean(), secant, by_datum, coupling)


def _coupled(shapes: list[tuple[int, ...]], chain_ndim: int) -> tuple[int, int]:
    """Return how many blocks of coordinates are decorrelated, and their size: one of all, or those of the groups.

    >>> (
    ...     _coupled([(20,), (3,)], 2),
    ...     _coupled([(72, 2), (20,)], 1),
    ...     _coupled([(72, 2), (21,)], 1),
    ...     _coupled([(784, 40)], 1),
    ... )
    ((1, 23), (82, 2), (0, 0), (0, 0))
    """
    sizes = [math.prod(shape) for shape in shapes]
    if sum(sizes) <= (MAX_COUPLED if chain_ndim == 2 else MAX_COUPLED_FEW):
        return 1, sum(sizes)
    largest = max(as_groups(shape)[1] for shape in shapes)
    if chain_ndim == 2 or largest > FEW or any(size % largest for size in sizes):
        return 0, 0
    return sum(sizes) // largest, largest


def proposal_shape(adapt: Adaptation, position: PyTree) -> Shape:
    """Return the proposals' shape relative to the shared step size; the variance broadcasts to ``[*C, *event]``."""
    if adapt.curvature is None:
        variance = jax.tree.map(lambda x: jnp.ones((), x.dtype), position)
    else:
        variance = jax.tree.map(lambda c: 1 / c, adapt.curvature)
    if adapt.by_datum is not None:
        factor = jnp.exp(adapt.by_datum.log_step)
        of_datum = lambda a, x: a.reshape((-1,) + (1,) * (x.ndim - 2))
        event = lambda v, x: v.reshape((1,) * (x.ndim - 1 - v.ndim) + v.shape)
        variance = jax.tree.map(lambda v, x: of_datum(factor, x) * event(v, x), variance, position)
    return Shape(variance, None if adapt.coupling is None else invert(adapt.coupling))


def _secants(gradient: PyTree, proposal: Proposal, shape: Shape, like: PyTree) -> PyTree:
    """Return how much the gradient changes over the steps, in units of the scales along them: root mean squares.

    ``like`` has the shapes of events.
    """

    def secant(v: Array, w: Array, g: Array, new: Array, like: Array) -> Array:
        axes = tuple(range(g.ndim - like.ndim))
        moved, turned = jnp.broadcast_to(v, w.shape) * jnp.square(w), jnp.square(new - g)
        known = jnp.isfinite(turned) & jnp.isfinite(moved)
        moved, turned = (jnp.sum(jnp.where(known, a, 0.0), axis=axes) for a in (moved, turned))
        return jnp.sqrt(turned / moved)

    return jax.tree.map(secant, shape.variance, proposal.moved, gradient, proposal.gradient, like)


def _update_mean(curvature: Array, gradient: Array, secant: Array, rate: Array) -> Array:
    """Move ``curvature`` towards the mean squared gradient, or the secant where that is less.

    At stationarity the mean squared gradient is the mean second derivative, and the secant about its root mean
    square, which is larger. What is not finite or zero is left out. A mean of another place (:data:`ELSEWHERE`) is
    forgotten, half its distance in the logarithm each time.
    """
    axes = tuple(range(gradient.ndim - curvature.ndim))
    square = jnp.mean(jnp.square(gradient), axis=axes)
    square = jnp.where((secant > 0) & ~(square < secant), secant, square)
    square = jnp.where(jnp.isfinite(square) & (square > 0), square, curvature)
    curvature = jnp.where(square < ELSEWHERE * curvature, jnp.sqrt(square) * jnp.sqrt(curvature), curvature)
    return curvature + rate * (square - curvature)
