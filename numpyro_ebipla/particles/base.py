"""What all ways to keep posterior particles share: blocks of chains, what is known there, and what a way must do."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
from jax import Array

from numpyro_ebipla._core.state import Adaptation, Latents, PosteriorState
from numpyro_ebipla._core.tree import take
from numpyro_ebipla._core.validate import check_counts, check_type
from numpyro_ebipla.kernels.base import AbstractKernel, Evaluation

Info = dict[str, Array]


class Terms(NamedTuple):
    """Log densities of N particles.

    Attributes:
        per_datum: ``[N, B]`` of what lies inside the data plate, by datum.
        rest: ``[N]`` of all else.
    """

    per_datum: Array
    rest: Array


#: Log joint density of the particles of a minibatch.
LogJoint = Callable[[Latents], Terms]
#: Fresh particles from the prior, by a key.
Draw = Callable[[Array], Latents]


class Known(NamedTuple):
    """What is known where particles stand.

    Attributes:
        local: each datum's by itself, ``[N, B]``, given the shared latents.
        shared: of the whole, ``[N]``, a minibatch standing for all data.
    """

    local: Evaluation
    shared: Evaluation


class Adaptations(NamedTuple):
    """The kernel's adaptation to the local block and to the shared one."""

    local: Adaptation
    shared: Adaptation


class Block(NamedTuple):
    """Chains of the current minibatch.

    Attributes:
        latents: where they stand.
        momentum: likewise, of underdamped kernels, else None.
        memory: see :class:`~numpyro_ebipla._core.state.PosteriorState`.
    """

    latents: Latents
    momentum: Latents | None = None
    memory: Any = None


class Prepared(NamedTuple):
    """What enters the gradient.

    Attributes:
        block: the particles.
        adapt: of the local and the shared block.
        weight: ``[N, B]`` (``[N]`` if there are shared latents), sums to one over N; None for ``1/N``.
        known: log densities and gradients there, if ``prepare`` had to compute them (without normalisers of
            energy priors); None leaves them to the step's own backward pass.
        info: what to report.
    """

    block: Block
    adapt: Adaptations
    weight: Array | None = None
    known: Known | None = None
    info: Info = {}

    @property
    def num_particles(self) -> int:
        """N, one without latents."""
        chains = jax.tree.leaves(self.block.latents)
        return chains[0].shape[0] if chains else 1


class AbstractParticles(ABC):
    """A way to keep particles: frozen options, and functions of them.

    Attributes:
        kernel: of all latents.
        num_moves: moves per step.
        weighted: whether the particles carry weights, and so a ``memory``.
    """

    weighted: ClassVar[bool]
    kernel: AbstractKernel
    num_moves: int

    @property
    @abstractmethod
    def recalls(self) -> bool:
        """Whether particles that were left behind are moved to the others, see :func:`.recall`."""

    @abstractmethod
    def start(self, latents: Latents, log_weight: Array, log_density: Array, variance: Array) -> Any:
        """Return the memory of a population that is exact at the initial parameters; None without weights.

        Args:
            latents: of all data.
            log_weight: ``[*C]`` whose log-mean-exp is the log marginal likelihood.
            log_density: ``[*C]`` log joint density.
            variance: ``[1, M]`` or ``[1]``, of the log marginal likelihood.
        """

    @abstractmethod
    def prepare(
        self, rng_key: Array, draw: Draw, log_joint: LogJoint, ratio: float, block: Block, adapt: Adaptations
    ) -> Prepared:
        """Return the particles of a minibatch at the current parameters, before the gradient.

        Args:
            rng_key: a PRNG key.
            draw: fresh particles from the prior's base.
            log_joint: of the minibatch.
            ratio: ``M/B``.
            block: where they stand.
            adapt: of the local and the shared block.
        """

    @abstractmethod
    def advance(
        self, rng_key: Array, log_joint: LogJoint, ratio: float, block: Block, known: Known, adapt: Adaptations
    ) -> tuple[Block, Adaptations, Info]:
        """Move the particles of a minibatch, after the gradient.

        Args:
            rng_key: a PRNG key.
            log_joint: of the minibatch.
            ratio: ``M/B``.
            block: where they stand.
            known: log densities and gradients there.
            adapt: of the local and the shared block.

        Returns:
            The new block, its adaptation and what to report, such as ``accept_local``.
        """

    @abstractmethod
    def drop_weights(self, rng_key: Array, block: Block) -> Block:
        """Return the particles as a population of equal weights, without a memory."""


class AbstractUnweighted(AbstractParticles):
    """Particles of equal weights, which carry nothing but themselves."""

    weighted: ClassVar[bool] = False

    def start(self, latents: Latents, log_weight: Array, log_density: Array, variance: Array) -> None:
        """Return no memory."""

    def drop_weights(self, rng_key: Array, block: Block) -> Block:
        """Return the particles as they are."""
        return block._replace(memory=None)


def check_moves(options: Any) -> None:
    """Raise unless the kernel is one and the number of moves a positive integer.

    Raises:
        TypeError, ValueError: naming the option.
    """
    check_counts(options, "num_moves")
    check_type(options, "kernel", AbstractKernel, "ULA(), MALA() or Underdamped()")


def gather(posterior: PosteriorState, indices: Array | None) -> tuple[Block, Adaptations]:
    """Return the particles of some data, None for all, and the kernels' adaptation to them."""
    momentum, memory = posterior.momentum, posterior.memory
    if momentum is not None:
        momentum = Latents(take(momentum.local, indices, 1), momentum.shared)
    if not posterior.shared:  # then all memory is by datum
        memory = take(memory, indices, 1)
    adapt = posterior.adapt_local._replace(by_datum=take(posterior.adapt_local.by_datum, indices, 0))
    latents = Latents(take(posterior.local, indices, 1), posterior.shared)
    return Block(latents, momentum, memory), Adaptations(adapt, posterior.adapt_shared)
