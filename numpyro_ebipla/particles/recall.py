"""Particles that were left behind: those whose log density no draw of their posterior would have.

A particle that begins far out in a heavy tail, where scales that suit the posterior make tiny steps, may not arrive
within a run, and takes the parameters with it. As in DREAM (Vrugt et al., 2009), it is moved to the best of the
particles of the same posterior, which all are there for the same purpose.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_ebipla.particles.persistent import Adaptations, Block, Known

#: Nats below the best particle of the same posterior, and times the typical distance of the best from the median.
#: A draw is as far down with a probability of about e⁻²¹.
LOST, SPREADS = 20.0, 5.0
#: Moves before the first look, as at the start all particles are far out and modes are still being found; then between
#: two looks.
FIRST_LOOK, BETWEEN_LOOKS = 200, 50


def recalled(block: Block, known: Known, due: Array) -> tuple[Block, Known, Array]:
    """Particles with lost ones put where the best one is.

    With global latents a particle is all of its latents, else every datum has particles of its own.

    Args:
        block: the particles.
        known: log densities and gradients there.
        due: of which posteriors to look at, ``[B]``, or a scalar.

    Returns:
        The block, what is known there, and the number of particles that were moved.
    """
    log_density = known[2] if block.glob else known[0]
    log_density = jnp.where(jnp.isnan(log_density), -jnp.inf, log_density)
    chains = (block.local, block.glob, known) if block.glob else (block.local, known[:2])
    if log_density.shape[0] < 3:  # of two, neither is typical
        return block, known, jnp.zeros(())

    def look(chains: Any) -> tuple[Any, Array]:
        best = log_density.max(0)
        spread = jnp.median(best - jnp.median(log_density, 0))
        lost = due & ~(log_density > best - LOST - SPREADS * spread) & jnp.isfinite(best)
        source = jnp.where(lost, log_density.argmax(0), jnp.arange(len(log_density)).reshape((-1,) + (1,) * best.ndim))

        def take(x: Array) -> Array:
            return jnp.take_along_axis(x, source.reshape(source.shape + (1,) * (x.ndim - source.ndim)), 0)

        return jax.tree.map(take, chains), lost.sum() * 1.0

    chains, number = lax.cond(jnp.any(due), look, lambda chains: (chains, jnp.zeros(())), chains)
    if block.glob:
        return block._replace(local=chains[0], glob=chains[1]), chains[2], number
    return block._replace(local=chains[0]), (*chains[1], *known[2:]), number


def due(adapt: Adaptations, block: Block) -> Array:
    """Whether it is time to look, by the moves so far of each posterior's particles."""
    local, glob = adapt
    count = glob.count if block.glob else local.count if local.by_datum is None else local.by_datum.count
    return (count >= FIRST_LOOK) & (count % BETWEEN_LOOKS == 0)
