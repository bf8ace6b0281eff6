r"""What keeps a fit from running away, in the order of a step, and what else does so elsewhere.

==================== ========================== ============================ =================== =======================
safeguard            watches                    does                         when                shown by
==================== ========================== ============================ =================== =======================
:func:`hole_penalty` particles deeper down in   adds twice their depth to    every step, where   without it digits,
                     the potential than hardly  the contrast, which pushes   strategies have     d = 16, stood at a gap
                     any walker, unless walkers the energy up there          ``brake_gap``       of 4.8 nats for good
                     are there, too                                                              [history]
:class:`Restraint`   the barrier between base   adds it to the contrast,     every step, where   ``(1.4, 2.5)``: below
                     and prior, along the       with a strength of zero at   strategies have a   the roll's own barrier,
                     walkers' ladder            ``begin``, one at ``full``   ``restraint``       gaps of 0.056 and 0.06;
                                                                                                 ``(1.8, 3)``: digits
                                                                                                 are held at 2.3–2.5
                                                                                                 [history]
:func:`energy_brake` the walkers' median poten- slows the energy's updates   every step, where   deviation not robust:
                     tial above the particles', down, then turns them back   strategies have     digits, d = 32, ran
                     beyond one plus the                                     ``brake_gap``       away at step 800;
                     walkers' deviation                                                          brake on either sign:
                                                                                                 log Z of 57,000
                                                                                                 [history]
:func:`trust`        the change of the energy   shortens the energy's        every step, where   0.15 that did not fall:
                     by an update, standard     updates to ``trust`` nats    strategies have     digits' MMD² 4.0e-3 at
                     deviation over the walkers times 1/√(1 + k/1000)        ``trust``           step 2500, 11.7e-3 at
                                                                                                 5000 [brakes]
:func:`slow_energy`  which parameters are the   leaves those of the base     every step          a base braked, too:
                     energy's own               and of all else alone                            diverged; not: 0.017
                                                                                                 nats [unseen]
:func:`recall`       particles far below the    puts them where the best     from move 200 on,   normal-gamma: two seeds
                     best of their posterior,   one is                       every 50 moves, for of six 8 % off; then
                     for :class:`.Particles`                                 :class:`.MALA`      none [unseen]
\                    the same, when draws are   the same                     once, before their  as above: it serves
                     collected                                               warm-up             ``infer``, which takes
                                                                                                 no steps
:func:`.follow`      particles whose mean slope takes them to the mean of    every step, where   a location of 300 sds
                     no equilibrium has, of     their posterior, if their    control variates    waited for its effects:
                     models small enough for    log density rises            are on              33 nats short; then
                     control variates                                                            1e-4 [quiet]
``MAX_DRIFT``        the drift of a proposal of cuts it off at four standard every move          ``poisson_50000``: a
                     :class:`.MALA`             deviations of its noise                          dozen frozen particles
                                                                                                 of 200,000; then none
                                                                                                 [suite]
:func:`is_sound`     numbers that are not       does not take the step, and  every step          a test: plain SGD on an
                     finite, walkers' densities the run ends                                     ever steeper energy
                     beyond ``max_energy``                                                       [bounds]
``ABSURD``, of       initial particles whose    draws them from the prior    once, at the start  noise in proportion to
``initial``          log density is below −1e12 again, up to ten times                           a mean near zero:
                                                                                                 no gradient; then 2e-4
                                                                                                 nats [starts]
``LARGEST``, of the  gradients of parameters    cuts each number             every step          as above: squares of
default optimiser    beyond 1e15                                                                 1e36 overflow [starts]
``ELSEWHERE``, of    a mean squared gradient a  forgets that mean            every move          as above: 0.3 nats
:class:`.MALA`       million times below its                                                     short; then 2e-4
                     running mean                                                                [starts]
``AWAY``, of         constrained parameters     begins with them where they  once, after 1000    a frontier's scale: 7
``second_start``     far from their start, in   began, with new particles,   steps, where        nats short; then 1e-3
                     which the likelihood is    the others where they are    :func:`.is_known`   [starts]
                     level
==================== ========================== ============================ =================== =======================

Figures are in the docs: [brakes] algorithm, "What holds the energy back"; [history] ibid., "How it came to this", and
the tables above it; [quiet] ibid., "Quiet gradients"; [starts] ibid., "Starts beyond measure" and "A second start";
[suite] suite, "What the suite changed"; [unseen] suite, "What unseen models changed"; and [bounds] in
tests/whole/test_bad_input.py. The tests of each are in tests/training, tests/particles, tests/smc, tests/kernels and
tests/whole/test_hostile.py. The first and the third do not act where walkers and particles agree.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from numpyro_ebipla._core.state import Params, TrainState
from numpyro_ebipla._core.tree import all_finite
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.optim.schedules import inverse_sqrt_decay
from numpyro_ebipla.optim.transforms import TINY
from numpyro_ebipla.particles.block import Adaptations, Block, Known
from numpyro_ebipla.smc.density import TiltedDensity
from numpyro_ebipla.smc.weights import quantile
from numpyro_ebipla.training.config import Config
from numpyro_ebipla.walkers.base import Walkers

#: Median absolute deviations of a normal law in its standard deviation.
NORMAL_DEVIATION = 1.4826
#: The floor of the energy: hardly any walker is below this quantile of their energies, less one deviation, less this
#: slack in nats for walkers whose energies are all the same.
FLOOR_QUANTILE, FLOOR_SLACK = 0.05, 1.0
#: Weight of the penalty on holes, against the contrast's own of one, which pulls the other way: above it, by as much.
HOLE_WEIGHT = 2.0
#: Depth of the particles, over that of the walkers, which noise explains.
EXPECTED = 2.0


class Gap(NamedTuple):
    """How far the walkers' potentials ``U = E − log p_0`` lie above the particles'.

    Where the prior is right walkers and particles have the same law, and so the same potentials; their energies alone
    say less, as the base has its part in the prior.

    Attributes:
        mean: difference of the means.
        median: of the medians.
        deviation: of the walkers, from the median absolute one: few walkers in a hole of the energy move neither.
        floor: a potential that hardly any walker is below, ``[D]`` for a prior of D elements.
    """

    mean: Array
    median: Array
    deviation: Array
    floor: Array


def measure_gap(weight: Array, walkers: Array, particles: Array) -> Gap:
    """Compare the potentials of walkers, with their weights, and of particles."""
    walkers, particles = jax.lax.stop_gradient((walkers, particles))
    middle = quantile(walkers, weight, 0.5)
    deviation = NORMAL_DEVIATION * quantile(jnp.abs(walkers - middle[None]), weight, 0.5)
    floor = quantile(walkers, weight, FLOOR_QUANTILE) - deviation - FLOOR_SLACK
    mean = jnp.mean(jnp.sum(weight * walkers, 0)) - jnp.mean(particles)
    return Gap(mean, jnp.mean(middle) - jnp.median(particles), jnp.mean(deviation), floor)


def hole_penalty(gap: Gap, particles: Array, weight: Array, walkers: Array) -> Array:
    """Raise the energy where particles are deeper down than the walkers say that the prior is.

    There the energy has a hole that no walker has found, and the contrast would only deepen it. At twice the
    contrast's own weight such particles push the energy up instead. Where as many walkers as particles are below the
    floor, or half as many, the prior has its mass there, and nothing is done.

    Args:
        gap: of the walkers.
        particles: their potentials, ``[n]`` or ``[n, D]``.
        weight: of the walkers.
        walkers: their potentials.
    """
    level = jnp.sum(weight * walkers, 0)  # so that a constant in the energy has no slope
    depth = jnp.mean(jnp.maximum(gap.floor - particles + level - jax.lax.stop_gradient(level), 0.0), 0)
    known = jnp.sum(weight * jnp.maximum(gap.floor - walkers, 0.0), 0)
    unknown = jnp.maximum(depth - EXPECTED * known, 0.0) / jnp.maximum(depth, TINY)
    return HOLE_WEIGHT * jnp.mean(jax.lax.stop_gradient(unknown) * depth)


def energy_brake(config: Config, gaps: dict[str, Gap]) -> Array:
    """Return a factor from −1 to 1 on the energy's updates: small where its walkers cannot keep up.

    A fit runs away where the energy falls at the particles in a place that no walker has visited, and the particles
    follow. Then the gap in potential between walkers and particles grows; beyond one plus the walkers' deviation the
    updates are held back, and soon reversed, which fills the hole up again. Data that the prior has not reached yet are
    higher in potential than the walkers, and hold nothing back.
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
    """Return a factor from 0 to 1 on the energy's updates, so that walkers can follow every step.

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


class Restraint(NamedTuple):
    """A penalty on the barrier between base and prior, for energies that sharpen faster than walkers can follow.

    Attributes:
        position: ``[K, p, *event]`` walkers at K temperatures.
        offset: see :class:`.LadderSample`.
        temperature: ``[K]``.
        strength: factor of the penalty.
    """

    position: Array
    offset: Array
    temperature: Array
    strength: Array

    def penalty(self, density: TiltedDensity) -> Array:
        """Return ``strength · ∫ ½ 𝔼|E(x) − E(x')| dt``, the communication barrier (Syed et al., 2022, eq. 19)."""
        num_temps, num = self.position.shape[:2]
        energy = density.energy(self.position.reshape((-1, *self.position.shape[2:])))
        energy = energy.reshape(num_temps, num, -1) + self.offset.reshape(num_temps, num, -1)
        spread = 0.5 * jnp.abs(energy[:, 1::2] - energy[:, : num - 1 : 2]).mean((1, 2))
        return self.strength * jnp.trapezoid(spread, self.temperature)


def restrain(config: Config, walk: dict[str, Walkers]) -> dict[str, Restraint]:
    """Return the restraints of the strategies that ask for one, by site.

    The strength rises from zero at a barrier of ``begin`` to one at ``full``, and on.
    """
    found = {}
    for name, strategy in config.walkers.items():
        ladder = walk[name].ladder
        if strategy.restraint is not None and ladder is not None:
            begin, full = strategy.restraint
            strength = jnp.maximum(ladder.barrier - begin, 0.0) / (full - begin)
            found[name] = Restraint(ladder.position, ladder.offset, ladder.temperature, strength)
    return found


def slow_energy(config: Config, updates: Params, factor: Array) -> Params:
    """Multiply the updates of the energy's parameters by a factor."""
    return {
        name: jax.tree.map(lambda u: factor.astype(u.dtype) * u, update) if name in config.energy_params else update
        for name, update in updates.items()
    }


#: Nats below the best particle of the same posterior, and times the typical distance of the best from the median.
#: A draw is as far down with a probability of about e⁻²⁰.
LOST, SPREADS = 20.0, 5.0
#: Moves before the first look, as at the start all particles are far out and modes are still being found; then between
#: two looks.
FIRST_LOOK, BETWEEN_LOOKS = 200, 50
#: Particles of a posterior, at least, for one to be called lost: of two, neither is typical.
FEWEST_TO_COMPARE = 3


def recall(block: Block, known: Known, due: Array) -> tuple[Block, Known, Array]:
    """Put particles that are lost where the best one is.

    With shared latents a particle is all of its latents, else every datum has particles of its own.

    Args:
        block: the particles.
        known: log densities and gradients there.
        due: of which posteriors to look at, ``[B]``, or a scalar.

    Returns:
        The block, what is known there, and the number of particles that were moved.
    """
    joint = bool(block.latents.shared)
    log_density = (known.shared if joint else known.local).log_density
    log_density = jnp.where(jnp.isnan(log_density), -jnp.inf, log_density)
    chains = (block.latents, known if joint else known.local)
    if log_density.shape[0] < FEWEST_TO_COMPARE:
        return block, known, jnp.zeros(())

    def look(chains: Any) -> tuple[Any, Array]:
        best = log_density.max(0)
        spread = jnp.median(best - jnp.median(log_density, 0))
        lost = due & ~(log_density > best - LOST - SPREADS * spread) & jnp.isfinite(best)
        source = jnp.where(lost, log_density.argmax(0), jnp.arange(len(log_density)).reshape((-1,) + (1,) * best.ndim))

        def take(x: Array) -> Array:
            return jnp.take_along_axis(x, source.reshape(source.shape + (1,) * (x.ndim - source.ndim)), 0)

        return jax.tree.map(take, chains), lost.sum() * 1.0

    (latents, here), number = lax.cond(jnp.any(due), look, lambda chains: (chains, jnp.zeros(())), chains)
    return block._replace(latents=latents), here if joint else known._replace(local=here), number


def is_due(adapt: Adaptations, block: Block) -> Array:
    """Return whether it is time to look, by the moves so far of each posterior's particles."""
    local, shared = adapt
    count = shared.count if block.latents.shared else local.count if local.by_datum is None else local.by_datum.count
    return (count >= FIRST_LOOK) & (count % BETWEEN_LOOKS == 0)


def is_sound(
    config: Config, value: Array, log_density: dict[str, Array], params: Params, block: Block, prior: dict[str, Any]
) -> Array:
    """Return whether a step may be taken: all it leads to is finite, and no energy is beyond ``max_energy``.

    Args:
        config: of the run.
        value: of the contrast.
        log_density: mean of the walkers', unnormalised, by site.
        params: after the step.
        block: the particles after it.
        prior: the walkers' states after it.
    """
    positions = [prior[name].position for name, strategy in config.walkers.items() if strategy.persists]
    largest = jnp.array([0.0, *(jnp.max(jnp.abs(e)) for e in log_density.values())])
    finite = all_finite((value, params, block.latents, block.momentum, positions))
    return finite & (largest < config.max_energy).all()
