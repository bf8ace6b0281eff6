"""What all ways to keep posterior particles share, and what a way must do."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from jax import Array

from numpyro_ebipla._core.state import Latents
from numpyro_ebipla._core.validate import check_counts, check_type
from numpyro_ebipla.kernels.base import AbstractKernel
from numpyro_ebipla.particles.block import Adaptations, Block, Draw, Info, Known, LogJoint, Prepared


class AbstractParticles(ABC):
    """A way to keep particles: frozen options, and functions of them.

    Attributes:
        kernel: of all latents.
        num_moves: moves per step.
        weighted: whether the particles carry weights, and so a ``memory``.
        quiet: whether control variates may serve, see :mod:`~numpyro_ebipla.smc.control`: of a posterior's draws they
            do, if its density has no jumps.
    """

    weighted: ClassVar[bool]
    kernel: AbstractKernel
    num_moves: int
    quiet: bool

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
    """Raise unless ``kernel`` is a kernel and ``num_moves`` a positive integer.

    Raises:
        TypeError, ValueError: naming the option.
    """
    check_counts(options, "num_moves")
    check_type(options, "kernel", AbstractKernel, "ULA(), MALA() or Underdamped()")
