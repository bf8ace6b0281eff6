"""Persistent particles, moved once or a few times at each step."""

from dataclasses import dataclass, field
from typing import final

from jax import Array

from numpyro_ebipla.kernels.base import AbstractKernel
from numpyro_ebipla.kernels.mala import MALA
from numpyro_ebipla.particles.base import AbstractUnweighted, check_moves
from numpyro_ebipla.particles.block import Adaptations, Block, Draw, Info, Known, LogJoint, Prepared
from numpyro_ebipla.particles.moves import follow, move_block
from numpyro_ebipla.smc.control import control_weights, fields_of, quiet_sites


@final
@dataclass(frozen=True)
class Particles(AbstractUnweighted):
    """Persistent particles.

    Local and global latents are moved in two blocks. Unadjusted kernels move both at once, from the gradients
    of the step's own backward pass (2510.12311, 2303.13429). MALA accepts local latents per particle and datum,
    then global ones per particle given these.

    When the data are subsampled, a global latent sees only a minibatch at a time, of which no acceptance test
    is exact. Then MALA still finds the step size at which the minibatch's target would be accepted, but global
    latents move unadjusted with that step times ``0.2 B/M``, which keeps the noise of the minibatch below about
    a tenth of that of the chain (stochastic-gradient Langevin; Welling and Teh, 2011).

    With ``quiet``, MALA's particles get weights that take the noise out of the parameters' gradient, where they are
    enough: a dozen, and twice as many as coordinates, or four times for the full effect. Particles of a datum count by
    themselves. In models with global latents the coordinates of all data count, of which groups share some, or of the
    global ones alone if these are too many; under subsampling there are no weights. See
    :mod:`~numpyro_ebipla.smc.control`. The same particles are taken along where a parameter leaves them far behind.

    Args:
        kernel: of all latents.
        num_moves: moves per step.
        quiet: whether control variates are used, where they can be. Choose False for a density that jumps in a latent,
            such as ``Uniform(0, x)`` of an observation.
    """

    kernel: AbstractKernel = field(default_factory=MALA)
    num_moves: int = 1
    quiet: bool = True

    def __post_init__(self) -> None:
        check_moves(self)

    @property
    def recalls(self) -> bool:
        """Whether moves are adjusted, so that a log density says how far out a particle is."""
        return self.kernel.adjusted

    def prepare(
        self, rng_key: Array, draw: Draw, log_joint: LogJoint, ratio: float, block: Block, adapt: Adaptations
    ) -> Prepared:
        """Return the particles as they stand, with weights that make the gradient quiet."""
        del rng_key, draw
        latents = block.latents
        chains, chain_ndim = (latents.shared, 1) if latents.shared else (latents.local, 2)
        known_in_part = bool(latents.shared) and ratio > 1
        if not self.quiet or not self.kernel.adjusted or known_in_part or not fields_of(chains, chain_ndim):
            return Prepared(block, adapt)
        latents, known = follow(log_joint, ratio, latents)
        weight = control_weights(quiet_sites(latents)[0], known.shared.gradient | known.local.gradient, chain_ndim)
        return Prepared(block._replace(latents=latents), adapt, weight, known)

    def advance(
        self, rng_key: Array, log_joint: LogJoint, ratio: float, block: Block, known: Known, adapt: Adaptations
    ) -> tuple[Block, Adaptations, Info]:
        """Make ``num_moves`` moves."""
        return move_block(self.kernel, self.num_moves, rng_key, log_joint, ratio, block, known, adapt)
