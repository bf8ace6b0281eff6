"""What all ways to keep prior walkers share, and what a way must do."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_ebipla._core.state import Adaptation
from numpyro_ebipla._core.tree import batched_value_and_grad
from numpyro_ebipla.kernels.base import AbstractKernel, Evaluation, Point, run_moves
from numpyro_ebipla.smc.anneal import draw_equally
from numpyro_ebipla.smc.density import TiltedDensity

Info = dict[str, Array]

#: Rounds of a strategy at parameters that are held, before its walkers are shown.
REPLAY_ROUNDS = 50


class LadderSample(NamedTuple):
    """Some walkers at every temperature between the base and the prior, and how hard they find the way.

    Attributes:
        position: ``[K, p, *event]`` walkers at K temperatures.
        offset: ``[K, p]`` (``[K, p, D]``) of the path's energy there over the model's: the log ratio of the density
            that the path starts from to the base.
        temperature: ``[K]``.
        barrier: sum over neighbouring temperatures of the probability that walkers do not swap.
    """

    position: Array
    offset: Array
    temperature: Array
    barrier: Array


class Walkers(NamedTuple):
    """What enters the gradient.

    With a normaliser of its own for each of D elements: ``[P, D, *event]`` and ``[P, D]``.

    Attributes:
        position: ``[P, *event]``.
        weight: ``[P]``, sums to one.
        ladder: of strategies that have one, for :class:`.Restraint`.
        quiet: weights for means whose noise control variates take away, some of them negative; None for ``weight``.
    """

    position: Array
    weight: Array
    ladder: LadderSample | None = None
    quiet: Array | None = None

    def mean(self, values: Array) -> Array:
        """Return the mean of a function's values at the walkers, as quietly as it is known."""
        return jnp.sum((self.weight if self.quiet is None else self.quiet) * values, 0)


class AbstractWalkers(ABC):
    """A way to keep walkers: frozen options, and functions of them.

    Each has a state of its own, a NamedTuple, that is carried from step to step.

    Attributes:
        persists: whether the walkers go on from step to step; their state then has their ``position``.
        per_datum: whether it can serve a prior that is conditional on covariates.
        follows_particles: whether ``prepare`` needs to know where the particles (or the data) are.
        brake_gap: whether the energy is slowed down where the walkers do not follow it, see :func:`.energy_brake`.
        trust: see :func:`.trust`; None for no limit.
        restraint: see :class:`.Restraint`; None for none.
    """

    persists: ClassVar[bool] = False
    per_datum: ClassVar[bool] = False
    follows_particles: ClassVar[bool] = False
    brake_gap: ClassVar[bool] = False
    trust: float | None = None
    restraint: tuple[float, float] | None = None

    @property
    @abstractmethod
    def shares_gradient(self) -> bool:
        """Whether ``advance`` uses the walkers' gradient of the step's own backward pass."""

    @abstractmethod
    def init(self, rng_key: Array, density: TiltedDensity) -> Any:
        """Return the state for the initial parameters."""

    @abstractmethod
    def prepare(
        self, rng_key: Array, density: TiltedDensity, state: Any, particles: Array | None = None
    ) -> tuple[Walkers, Any, Info]:
        """Return walkers and weights at the current parameters, before the gradient; the new state; what to report.

        ``particles [n, *event]`` are the posterior particles at the site (the data, if it is observed); strategies
        with ``follows_particles`` go on from where they are without them.
        """

    @abstractmethod
    def advance(
        self,
        rng_key: Array,
        density: TiltedDensity,
        following: TiltedDensity,
        state: Any,
        known: Evaluation | None,
    ) -> tuple[Any, Info]:
        """Return the state at the next parameters, and what to report.

        ``known`` is what the step knows of the walkers, if the strategy shares its gradient.
        """

    @abstractmethod
    def draw(self, rng_key: Array, walkers: Walkers, state: Any) -> Array:
        """Draw equally weighted walkers ``[P, ...]`` from what ``prepare`` returned."""

    def replay(self, rng_key: Array, before: TiltedDensity, at: TiltedDensity, state: Any) -> tuple[Array, Info]:
        """Bring walkers from one density to another and move them on there: equally weighted, ``[P, ...]``."""
        key_change, key_rounds, key_last, key_draw = random.split(rng_key, 4)
        if self.persists:
            state, _ = self.advance(key_change, before, at, state, None)

            def one_round(state: Any, key: Array) -> tuple[Any, None]:
                key_prepare, key_advance = random.split(key)
                _, state, _ = self.prepare(key_prepare, at, state)
                return self.advance(key_advance, at, at, state, None)[0], None

            state, _ = lax.scan(one_round, state, random.split(key_rounds, REPLAY_ROUNDS))
        walkers, state, info = self.prepare(key_last, at, state)
        return self.draw(key_draw, walkers, state), info


class AbstractPrepared(AbstractWalkers):
    """Walkers that ``prepare`` brings up to date, so that nothing is left to be moved after the gradient."""

    @property
    def shares_gradient(self) -> bool:
        """False: no move follows the gradient."""
        return False

    def advance(
        self,
        rng_key: Array,
        density: TiltedDensity,
        following: TiltedDensity,
        state: Any,
        known: Evaluation | None,
    ) -> tuple[Any, Info]:
        """Return the state as it is."""
        del rng_key, density, following, known
        return state, {}


def chain_shape(density: TiltedDensity, x: Array) -> tuple[int, ...]:
    """Return the shape of the walkers' log densities, ``(P,)`` or ``(P, D)``, without computing them."""
    return jax.eval_shape(density.log_base, x).shape


def equal_weights(density: TiltedDensity, x: Array) -> Array:
    """Return weights of walkers that all count the same."""
    shape = chain_shape(density, x)
    return jnp.full(shape, 1 / shape[0], x.dtype)


def draw_resampled(rng_key: Array, walkers: Walkers) -> Array:
    """Draw as many equally weighted walkers as there are weighted ones, by resampling."""
    return draw_equally(rng_key, walkers.position, jnp.log(walkers.weight), walkers.weight.shape[0])


def move_walkers(
    kernel: AbstractKernel,
    num_moves: int,
    rng_key: Array,
    density: TiltedDensity,
    point: Point,
    adapt: Adaptation,
) -> tuple[Point, Adaptation, Array]:
    """Make ``num_moves`` moves towards a density; see :func:`.run_moves` for what is returned."""
    target = batched_value_and_grad(density.log_density)
    return run_moves(kernel, random.split(rng_key, num_moves), target, point, adapt)
