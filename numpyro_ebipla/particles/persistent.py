"""Posterior particles: N for each datum (local latents) or N in all (global ones), and ways to keep them.

===============================  =======================================================================
:class:`Particles`               persistent: moved once or a few times at each step (EBIPLA, IPLA, PGD)
:class:`ShortRunParticles`       restarted from the prior's base at every step (LEBM)
:class:`SuccessiveParticles`     successive states of a single chain (SOUL)
:class:`.WeightedParticles`      persistent with Jarzynski weights (JALA-EM)
===============================  =======================================================================

Each is a frozen set of options with two functions: ``prepare`` makes what enters the step's gradient at
``θ_k``, ``advance`` moves the particles on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_ebipla._core.state import Adaptation, Latents, PosteriorState
from numpyro_ebipla._core.tree import batched_value_and_grad, normal_like, take
from numpyro_ebipla._core.validate import check_counts, check_type
from numpyro_ebipla.kernels.mala import MALA, ULA, Kernel, Point, Target, evaluated, proposal_shape

LogJoint = Callable[[Latents, Latents], tuple[Array, Array]]
Draw = Callable[[Array], tuple[Latents, Latents]]
Adaptations = tuple[Adaptation, Adaptation]
#: Log densities and gradients at a block: local ``[N, B]``, global ``[N]``.
Known = tuple[Array, Latents, Array, Latents]
#: The local block and the global one.
Points = tuple[Point, Point]

#: Of a global latent's step under subsampling, see :class:`Particles`.
_SUBSAMPLING_STEP = 0.2


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


@dataclass(frozen=True)
class Particles:
    """Persistent particles.

    Local and global latents are moved in two blocks. Unadjusted kernels move both at once, from the gradients
    of the step's own backward pass (2510.12311, 2303.13429). MALA accepts local latents per particle and datum,
    then global ones per particle given these.

    When the data are subsampled, a global latent sees only a minibatch at a time, of which no acceptance test
    is exact. Then MALA still finds the step size at which the minibatch's target would be accepted, but global
    latents move unadjusted with that step times ``0.2 B/M``, which keeps the noise of the minibatch below about
    a tenth of that of the chain (stochastic-gradient Langevin; Welling and Teh, 2011).

    Args:
        kernel: of all latents.
        num_moves: moves per step.
    """

    kernel: Kernel = field(default_factory=MALA)
    num_moves: int = 1
    weighted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(self, "num_moves")
        check_type(self, "kernel", Kernel, "ULA(), MALA() or Underdamped()")

    @property
    def recalls(self) -> bool:
        """Whether particles that were left behind are moved to the others, see :func:`.recalled`."""
        return type(self) is Particles and self.kernel.adjusted

    def prepare(
        self, rng_key: Array, draw: Draw, log_joint: LogJoint, ratio: float, block: Block, adapt: Adaptations
    ) -> Prepared:
        """Particles of a minibatch at the current parameters, before the gradient.

        Args:
            rng_key: a PRNG key.
            draw: ``rng_key -> (local, global)``, fresh particles from the prior's base.
            log_joint: see :meth:`advance`.
            ratio: ``M/B``.
            block: where they stand.
            adapt: of the local and the global block.
        """
        del rng_key, draw, log_joint, ratio
        return Prepared(block, adapt)

    def start(self, local: Latents, glob: Latents, log_weight: Array, log_density: Array, variance: Array) -> Any:
        """Memory of a population that is exact at the initial parameters, for weighted particles.

        Args:
            local: ``{site: [N, M, *event]}``.
            glob: ``{site: [N, *event]}``.
            log_weight: ``[*C]`` whose log-mean-exp is the log marginal likelihood.
            log_density: ``[*C]`` log joint density.
            variance: ``[1, M]`` or ``[1]``, of the log marginal likelihood.
        """
        del local, glob, log_weight, log_density, variance

    def equally_weighted(self, rng_key: Array, block: Block) -> Block:
        """The particles as a population without weights."""
        del rng_key
        return block

    def advance(
        self, rng_key: Array, log_joint: LogJoint, ratio: float, block: Block, known: Known, adapt: Adaptations
    ) -> tuple[Block, Adaptations, dict[str, Array]]:
        """Move the particles of a minibatch.

        Args:
            rng_key: a PRNG key.
            log_joint: ``(local, global) -> ([N, B] per datum, [N] rest)`` log densities.
            ratio: ``M/B``.
            block: where they stand.
            known: log densities and gradients there: local ``[N, B]``, global ``[N]``.
            adapt: of the local and the global block.

        Returns:
            The new block, its adaptation and ``{"accept": …}`` by block.
        """
        points, adapt, info = self.moved(rng_key, log_joint, ratio, points_of(block, known), adapt)
        momenta = None if block.momentum is None else (points[0].momentum, points[1].momentum)
        return Block(*positions(points), momenta, block.memory), adapt, info

    def moved(
        self, rng_key: Array, log_joint: LogJoint, ratio: float, points: Points, adapt: Adaptations
    ) -> tuple[Points, Adaptations, dict[str, Array]]:
        """As :meth:`advance`, with what the kernels know where the particles arrive."""
        *first, last = random.split(rng_key, self.num_moves)

        def sweep(carry: Any, key: Array) -> tuple[Any, Any]:
            points, adapt, info = self._sweep(key, log_joint, ratio, *carry)
            return (refreshed(log_joint, ratio, points), adapt), info

        if first:
            (points, adapt), _ = lax.scan(sweep, (points, adapt), jnp.stack(first))
        return self._sweep(last, log_joint, ratio, points, adapt)

    def _sweep(
        self, rng_key: Array, log_joint: LogJoint, ratio: float, points: Points, adapt: Any
    ) -> tuple[Points, Any, dict[str, Array]]:
        """One move of the local block and one of the global block."""
        key_local, key_global = random.split(rng_key)
        (local, glob), (adapt_local, adapt_global) = points, adapt
        info = {}
        if local.position:
            target, here = _local_target(log_joint, glob.position), local
            local, move = self.kernel.move(key_local, target, here, adapt_local)
            adapt_local = self.kernel.adapt(adapt_local, move, here)
            info["accept_local"] = move.accept_prob
        if glob.position:
            here = glob
            if local.position and self.kernel.adjusted:  # what is known belongs to the old local latents
                here = glob._replace(log_density=None, gradient=None)
            target = _global_target(log_joint, ratio, local.position)
            here = evaluated(target, here)
            glob, move = self.kernel.move(key_global, target, here, adapt_global)
            if self.kernel.adjusted and ratio > 1:
                glob = _unadjusted(key_global, here, adapt_global, ratio)
            adapt_global = self.kernel.adapt(adapt_global, move, here)
            info["accept_global"] = move.accept_prob
        return (local, glob), (adapt_local, adapt_global), info


@dataclass(frozen=True)
class ShortRunParticles(Particles):
    """Restarted from the prior's base (``p_0`` of an energy prior) at every step, then K moves (2006.08205, Alg. 1).

    What they reach is not the posterior, so the gradient is biased by as much as they fall short of it.

    Args:
        kernel: of all latents; LEBM writes its step ``s``, with ``h = s²/2``.
        num_moves: K.
    """

    kernel: Kernel = field(default_factory=lambda: ULA(0.1**2 / 2))
    num_moves: int = 20

    def prepare(
        self, rng_key: Array, draw: Draw, log_joint: LogJoint, ratio: float, block: Block, adapt: Adaptations
    ) -> Prepared:
        """As :meth:`Particles.prepare`."""
        key_draw, key_momentum, key_moves = random.split(rng_key, 3)
        local, glob = draw(key_draw)
        momentum = normal_like(key_momentum, (local, glob)) if self.kernel.has_momentum else None
        known = evaluated_at(log_joint, ratio, local, glob)
        start = Block(local, glob, momentum, block.memory)
        block, adapt, info = super().advance(key_moves, log_joint, ratio, start, known, adapt)
        return Prepared(block, adapt, info=info)

    def advance(
        self, rng_key: Array, log_joint: LogJoint, ratio: float, block: Block, known: Known, adapt: Adaptations
    ) -> tuple[Block, Adaptations, dict[str, Array]]:
        """Nothing to do: see :meth:`prepare`."""
        return block, adapt, {}


@dataclass(frozen=True)
class SuccessiveParticles(Particles):
    """One chain, whose next N states are the N particles of a step (SOUL; De Bortoli et al., 2021, Alg. 1).

    Args:
        kernel: of all latents; ULA in the paper.
        num_moves: between two of these states.
    """

    kernel: Kernel = field(default_factory=lambda: ULA(1e-2))

    def prepare(
        self, rng_key: Array, draw: Draw, log_joint: LogJoint, ratio: float, block: Block, adapt: Adaptations
    ) -> Prepared:
        """As :meth:`Particles.prepare`."""
        last = jax.tree.map(lambda x: x[-1:], block._replace(memory=None))
        num = jax.tree.leaves(block)[0].shape[0]

        def move(carry: tuple[Block, Adaptations], key: Array) -> tuple[Any, Any]:
            here, adapt = carry
            known = evaluated_at(log_joint, ratio, here.local, here.glob)
            there, adapt, info = super(SuccessiveParticles, self).advance(key, log_joint, ratio, here, known, adapt)
            return (there, adapt), (there, info)

        (_, adapt), (states, info) = lax.scan(move, (last, adapt), random.split(rng_key, num))
        return Prepared(jax.tree.map(lambda x: x[:, 0], states), adapt, info=jax.tree.map(jnp.mean, info))

    def advance(
        self, rng_key: Array, log_joint: LogJoint, ratio: float, block: Block, known: Known, adapt: Adaptations
    ) -> tuple[Block, Adaptations, dict[str, Array]]:
        """Nothing to do: see :meth:`prepare`."""
        return block, adapt, {}


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


def _local_target(log_joint: LogJoint, glob: Latents) -> Target:
    return batched_value_and_grad(lambda local: log_joint(local, glob)[0])


def _global_target(log_joint: LogJoint, ratio: float, local: Latents) -> Target:
    def whole(glob: Latents) -> Array:
        per_datum, rest = log_joint(local, glob)
        return ratio * per_datum.sum(-1) + rest

    return batched_value_and_grad(whole)


def refreshed(log_joint: LogJoint, ratio: float, points: Points) -> Points:
    """Points with log densities and gradients at their present positions."""
    local, glob = points
    if local.position and not glob.position:
        return evaluated(_local_target(log_joint, {}), local), glob
    if glob.position and not local.position:
        return local, evaluated(_global_target(log_joint, ratio, {}), glob)
    value, grad, whole, grad_whole = evaluated_at(log_joint, ratio, local.position, glob.position)
    here = Point(local.position, value, grad, local.momentum)
    return here, Point(glob.position, whole, grad_whole, glob.momentum)


def _unadjusted(rng_key: Array, here: Point, adapt: Adaptation, ratio: float) -> Point:
    """A stochastic-gradient Langevin move with MALA's step, shortened as :class:`Particles` says."""
    h = jnp.exp(adapt.log_step) * _SUBSAMPLING_STEP / ratio
    noise = normal_like(random.fold_in(rng_key, 1), here.position)
    shape = proposal_shape(adapt, here.position)
    moved = jax.tree.map(lambda u, xi: h * u + jnp.sqrt(2 * h) * xi, shape.white(here.gradient), noise)
    return Point(jax.tree.map(jnp.add, here.position, shape.back(moved)), None, None)
