"""What all ways to keep prior walkers share."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_ebipla._core.state import Adaptation, WalkerState
from numpyro_ebipla._core.tree import batched_value_and_grad
from numpyro_ebipla.kernels.base import Kernel, Point, evaluated
from numpyro_ebipla.smc.anneal import draw_equally
from numpyro_ebipla.smc.density import TiltedDensity

Info = dict[str, Array]

#: Rounds of a strategy at parameters that are held, before its walkers are shown.
REPLAY_ROUNDS = 50


class Walkers(NamedTuple):
    """What enters the gradient: positions ``[P, *event]`` and weights ``[P]`` that sum to one.

    With a normaliser of its own for each of D elements: ``[P, D, *event]`` and ``[P, D]``.
    ``restraint`` holds the energy back, if the strategy asks for it.
    """

    position: Array
    weight: Array
    restraint: "Restraint | None" = None


class Restraint(NamedTuple):
    """A penalty on the barrier between base and prior, for energies that sharpen faster than walkers can follow.

    Attributes:
        position: ``[K, p, *event]`` walkers at K temperatures.
        temperature: ``[K]``.
        strength: factor of the penalty.
    """

    position: Array
    temperature: Array
    strength: Array

    def penalty(self, density: TiltedDensity) -> Array:
        """``strength · ∫ ½ 𝔼|E(x) − E(x')| dt``, the communication barrier (Syed et al., 2022, eq. 19)."""
        num_temps, num = self.position.shape[:2]
        energy = density.energy(self.position.reshape((-1, *self.position.shape[2:]))).reshape(num_temps, num, -1)
        spread = 0.5 * jnp.abs(energy[:, 1::2] - energy[:, : num - 1 : 2]).mean((1, 2))
        return self.strength * jnp.trapezoid(spread, self.temperature)


class Moved(NamedTuple):
    """Walkers after some moves: positions, log densities and momenta, adaptation, mean acceptance."""

    position: Array
    log_density: Array | None
    momentum: Array | None
    adapt: Adaptation
    accept: Array


def moved(
    kernel: Kernel,
    num_moves: int,
    rng_key: Array,
    density: TiltedDensity,
    position: Array,
    momentum: Array | None,
    adapt: Adaptation,
    known: tuple[Array, Array] | None = None,
) -> Moved:
    """Walkers after ``num_moves`` moves; ``known`` are their log densities and gradients, if there are any."""
    target = batched_value_and_grad(lambda p: density.log_density(p["x"]))
    named = lambda a: None if a is None else {"x": a}
    value, gradient = known or (None, None)
    point = Point({"x": position}, value, named(gradient), named(momentum))

    def move(carry: tuple[Point, Adaptation], key: Array) -> tuple[tuple[Point, Adaptation], Array]:
        here, adapt = evaluated(target, carry[0]), carry[1]
        there, info = kernel.move(key, target, here, adapt)
        return (there, kernel.adapt(adapt, info, here)), info.accept_prob

    first, *rest = random.split(rng_key, num_moves)
    (point, adapt), accept = move((point, adapt), first)
    if rest:
        (point, adapt), others = lax.scan(move, (point, adapt), jnp.stack(rest))
        accept = (accept + others.sum()) / num_moves
    last = None if point.momentum is None else point.momentum["x"]
    return Moved(point.position["x"], point.log_density, last, adapt, accept)


class WalkerStrategy:
    """Base of the strategies.

    Attributes:
        shares_gradient: whether ``advance`` uses the walkers' gradient of the step's own backward pass.
        per_datum: whether it can serve a prior that is conditional on covariates.
        follows_particles: whether ``prepare`` needs to know where the particles (or the data) are.
        brake_gap: whether the energy is slowed down while its mean at the particles and at the walkers differ by
            more than one plus the walkers' standard deviation. A gap that grows is how a fit runs away: the
            energy falls where the particles are, and no walker has been there yet.
        trust: the most that a step may change the energy by, as a standard deviation over the walkers in nats.
    """

    shares_gradient = False
    per_datum = False
    follows_particles = False
    brake_gap = False
    trust: float | None = None

    def init(self, rng_key: Array, density: TiltedDensity) -> WalkerState:
        """Walkers for the initial parameters."""
        raise NotImplementedError

    def prepare(
        self, rng_key: Array, density: TiltedDensity, state: WalkerState, particles: Array | None = None
    ) -> tuple[Walkers, WalkerState, Info]:
        """Walkers and weights at the current parameters, before the gradient.

        ``particles [n, *event]`` are the posterior particles at the site (the data, if it is observed); strategies
        with ``follows_particles`` go on from where they are without them.
        """
        raise NotImplementedError

    def advance(
        self,
        rng_key: Array,
        density: TiltedDensity,
        following: TiltedDensity,
        state: WalkerState,
        known: tuple[Array, Array] | None,
    ) -> tuple[WalkerState, Info]:
        """Walkers at the next parameters; ``known`` are log densities and gradients from the step."""
        del rng_key, density, following, known
        return state, {}

    def replay(
        self, rng_key: Array, before: TiltedDensity, at: TiltedDensity, state: WalkerState
    ) -> tuple[Array, Info]:
        """Walkers brought from one density to another and moved on there, equally weighted: ``[P, ...]``."""
        key_change, key_rounds, key_last, key_draw = random.split(rng_key, 4)
        if state.position is not None:
            state, _ = self.advance(key_change, before, at, state, None)

            def one_round(state: WalkerState, key: Array) -> tuple[WalkerState, None]:
                key_prepare, key_advance = random.split(key)
                _, state, _ = self.prepare(key_prepare, at, state)
                return self.advance(key_advance, at, at, state, None)[0], None

            state, _ = lax.scan(one_round, state, random.split(key_rounds, REPLAY_ROUNDS))
        walkers, state, info = self.prepare(key_last, at, state)
        return self.shown(key_draw, walkers, state), info

    def shown(self, rng_key: Array, walkers: Walkers, state: WalkerState) -> Array:
        """Of what ``prepare`` returned, walkers of equal weight ``[P, ...]``."""
        del state
        return draw_equally(rng_key, walkers.position, jnp.log(walkers.weight), walkers.weight.shape[0])
