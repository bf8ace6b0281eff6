"""What keeps a fit from running away."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from numpyro_ebipla._core.state import Params, TrainState
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.optim.schedules import inverse_sqrt_decay
from numpyro_ebipla.particles.base import Adaptations, Block, Known
from numpyro_ebipla.smc.weights import quantile
from numpyro_ebipla.training.config import Config
from numpyro_ebipla.walkers.base import Walkers


class EnergyGap(NamedTuple):
    """How far the walkers' energies lie above the particles' mean: their mean, their median; and their deviation.

    Median and deviation (from the median absolute one) are not moved by a few walkers in a hole of the energy. The
    ``floor`` is an energy that hardly any walker is below, ``[D]`` for a prior of D elements.
    """

    mean: Array
    median: Array
    deviation: Array
    floor: Array


def energy_gap(weight: Array, energy: Array, particles: Array) -> EnergyGap:
    """How far the energies of the walkers, with their weights, lie above the mean energy of the particles."""
    energy = jax.lax.stop_gradient(energy)
    middle = quantile(energy, weight, 0.5)
    deviation = 1.4826 * quantile(jnp.abs(energy - middle), weight, 0.5)  # a standard deviation, were they normal
    mean = jnp.mean(jnp.sum(weight * energy, 0))
    floor = quantile(energy, weight, 0.05) - deviation - 1
    return EnergyGap(mean - particles, jnp.mean(middle) - particles, jnp.mean(deviation), floor)


def hole_penalty(gap: EnergyGap, particles: Array, weight: Array, walkers: Array) -> Array:
    """Raise the energy where particles are deeper down than hardly any walker is.

    There the energy has a hole that no walker has found, and the contrast would only deepen it. At twice the
    contrast's own weight such particles push the energy up instead. Where walkers and particles agree there are none.

    Args:
        gap: of the walkers.
        particles: their energies.
        weight: of the walkers.
        walkers: their energies.
    """
    level = jnp.sum(weight * walkers, 0)  # so that a constant in the energy has no slope
    depth = gap.floor - particles + level - jax.lax.stop_gradient(level)
    return 2 * jnp.mean(jnp.maximum(depth, 0.0))


def energy_brake(config: Config, gaps: dict[str, EnergyGap]) -> Array:
    """A factor from −1 to 1 on the energy's updates: small where its walkers cannot keep up.

    A fit runs away where the energy falls at the particles in a place that no walker has visited, and the particles
    follow. Then the gap in energy between walkers and particles grows; beyond one plus the walkers' deviation the
    updates are held back, and soon reversed, which fills the hole up again.
    """
    brake = jnp.ones(())
    for name, strategy in config.walkers.items():
        if strategy.brake_gap:
            excess = jnp.maximum(gaps[name].median / (1 + gaps[name].deviation), 1.0)
            brake = jnp.minimum(brake, 2 / jnp.square(excess) - 1)
    return brake


def trust(
    config: Config, state: TrainState, updates: Params, batch: Batch, walk: dict[str, Walkers], energy: dict[str, Array]
) -> Array:
    """A factor from 0 to 1 on the energy's updates, so that no step changes its shape faster than walkers can follow.

    The change is measured where it matters, by its standard deviation over the walkers in nats. What is allowed falls
    like the default optimiser's rates: where the bound binds all the way, a constant one would be a constant noise.
    """
    factor = jnp.ones(())
    limits = {name: strategy.trust for name, strategy in config.walkers.items() if strategy.trust is not None}
    if not limits:
        return factor
    model = config.model
    after = model.tilted(model.constrain_params(optax.apply_updates(state.params, updates)), batch)
    slower = inverse_sqrt_decay(1)(state.step)
    for name, limit in limits.items():
        change = after[name].energy(walk[name].position) - energy[name]
        weight = walk[name].weight
        centred = change - jnp.sum(weight * change, 0)
        deviation = jnp.sqrt(jnp.mean(jnp.sum(weight * jnp.square(centred), 0)))
        factor = jnp.minimum(factor, slower * limit / jnp.maximum(deviation, slower * limit))
    return jnp.where(jnp.isfinite(factor), factor, 0.0)


def braked(config: Config, updates: Params, brake: Array) -> Params:
    """``updates`` with those of the energy's parameters slowed down."""
    return {
        name: jax.tree.map(lambda u: brake.astype(u.dtype) * u, update) if name in config.energy_params else update
        for name, update in updates.items()
    }


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
