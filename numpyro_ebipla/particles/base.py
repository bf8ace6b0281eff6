"""What all ways to keep posterior particles share: blocks of chains, and what is known where they stand."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from numpyro_ebipla._core.state import Adaptation, Latents, PosteriorState
from numpyro_ebipla._core.tree import batched_value_and_grad, take
from numpyro_ebipla.kernels.base import Point, Target, evaluated

LogJoint = Callable[[Latents, Latents], tuple[Array, Array]]
Draw = Callable[[Array], tuple[Latents, Latents]]
Adaptations = tuple[Adaptation, Adaptation]
#: Log densities and gradients at a block: local ``[N, B]``, global ``[N]``.
Known = tuple[Array, Latents, Array, Latents]
#: The local block and the global one.
Points = tuple[Point, Point]


class Block(NamedTuple):
    """Chains of the current minibatch; see :class:`~numpyro_ebipla._core.state.PosteriorState`."""

    local: Latents
    glob: Latents
    momentum: tuple[Latents, Latents] | None
    memory: Any = None


class Prepared(NamedTuple):
    """What enters the gradient.

    Attributes:
        block: the particles.
        adapt: of the local and the global block.
        weight: ``[N, B]`` (``[N]`` if there are global latents), sums to one over N; None for ``1/N``.
        known: log densities and gradients there, if ``prepare`` had to compute them (without normalisers of
            energy priors); None leaves them to the step's own backward pass.
        info: what to report.
    """

    block: Block
    adapt: Adaptations
    weight: Array | None = None
    known: Known | None = None
    info: dict[str, Array] = {}

    @property
    def num_particles(self) -> int:
        """N, one without latents."""
        chains = jax.tree.leaves((self.block.local, self.block.glob))
        return chains[0].shape[0] if chains else 1


def gather(posterior: PosteriorState, indices: Array | None) -> tuple[Block, Adaptations]:
    """The particles of some data, None for all, and the kernels' adaptation to them."""
    momentum, memory = posterior.momentum, posterior.memory
    if momentum is not None:
        momentum = (take(momentum[0], indices, 1), momentum[1])
    if not posterior.glob:  # then all memory is by datum
        memory = take(memory, indices, 1)
    adapt = posterior.adapt_local._replace(by_datum=take(posterior.adapt_local.by_datum, indices, 0))
    block = Block(take(posterior.local, indices, 1), posterior.glob, momentum, memory)
    return block, (adapt, posterior.adapt_global)


def evaluated_at(log_joint: LogJoint, ratio: float, local: Latents, glob: Latents) -> Known:
    """``known`` for :meth:`Particles.advance`, where no step has computed it."""

    def total(local: Latents, glob: Latents) -> tuple[Array, tuple[Array, Array]]:
        per_datum, rest = log_joint(local, glob)
        return per_datum.sum() + rest.sum() / ratio, (per_datum, rest)

    (_, (per_datum, rest)), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(local, glob)
    return per_datum, grads[0], ratio * per_datum.sum(-1) + rest, jax.tree.map(lambda g: ratio * g, grads[1])


def points_of(block: Block, known: Known) -> Points:
    """The block with what is known there."""
    momentum = block.momentum or (None, None)
    return Point(block.local, *known[:2], momentum[0]), Point(block.glob, *known[2:], momentum[1])


def positions(points: Points) -> tuple[Latents, Latents]:
    """Of the local block and the global one."""
    return points[0].position, points[1].position


def local_target(log_joint: LogJoint, glob: Latents) -> Target:
    """Return the log density of the local latents, each datum's by itself, given the global ones."""
    return batched_value_and_grad(lambda local: log_joint(local, glob)[0])


def global_target(log_joint: LogJoint, ratio: float, local: Latents) -> Target:
    """Return the log density of the global latents given the local ones, a minibatch standing for all data."""

    def whole(glob: Latents) -> Array:
        per_datum, rest = log_joint(local, glob)
        return ratio * per_datum.sum(-1) + rest

    return batched_value_and_grad(whole)


def refreshed(log_joint: LogJoint, ratio: float, points: Points) -> Points:
    """Points with log densities and gradients at their present positions."""
    local, glob = points
    if local.position and not glob.position:
        return evaluated(local_target(log_joint, {}), local), glob
    if glob.position and not local.position:
        return local, evaluated(global_target(log_joint, ratio, {}), glob)
    value, grad, whole, grad_whole = evaluated_at(log_joint, ratio, local.position, glob.position)
    here = Point(local.position, value, grad, local.momentum)
    return here, Point(glob.position, whole, grad_whole, glob.momentum)
