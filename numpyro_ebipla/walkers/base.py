r"""Ways to keep prior walkers, which estimate ``E_{p_α}[∇_α U]``, the gradient of ``−log Z``.

===================== ======================================================================  ============
strategy              a training step                                                         right at
===================== ======================================================================  ============
:class:`Persistent`   moves the walkers once; unweighted (EBIPLA, PCD) or with Jarzynski       slow energies;
                      weights and resampling (2305.19414)                                      every step
:class:`Annealed`     anneals a fresh population from the base by sequential Monte Carlo       every step
:class:`.Tempered`    moves and swaps persistent replicas between the base and the prior       slow energies
                      (parallel tempering), the hottest ones redrawn exactly                   on any shape
:class:`.ShortRun`    restarts from the base and makes K moves (LEBM)                          K → ∞
:class:`.Contrastive` restarts at the particles, or at the data, and makes K moves (CD-k)      K → ∞
===================== ======================================================================  ============

Each is a frozen set of options with three functions: ``init`` makes a
:class:`~numpyro_ebipla._core.state.WalkerState`, ``prepare`` gives the walkers and weights that enter the step's
gradient, ``advance`` lets them follow the parameters from ``θ_k`` to ``θ_{k+1}``.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_ebipla._core.state import Adaptation, WalkerState
from numpyro_ebipla._core.tree import batched_value_and_grad
from numpyro_ebipla._core.validate import check_counts, check_number, check_type, count
from numpyro_ebipla.kernels.mala import MALA, ULA, Kernel, Point, evaluated
from numpyro_ebipla.smc.anneal import TiltedDensity, anneal, equally_weighted
from numpyro_ebipla.smc.weights import ess, log_mean_exp, normalised, resample, ula_increment

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
        weighted: Any = SimpleNamespace(position=walkers.position, log_weight=jnp.log(walkers.weight))
        return equally_weighted(rng_key, weighted, walkers.weight.shape[0])


@dataclass(frozen=True)
class Persistent(WalkerStrategy):
    """Walkers that persist over the steps.

    Args:
        num_walkers: P.
        kernel: ULA, MALA or Underdamped.
        num_moves: moves per step.
        weighted: carry Jarzynski weights (2305.19414, Alg. 1 for ULA; the increment
            ``U_k(x) − U_{k+1}(x)`` before each move for MALA), resample systematically when the ESS falls
            below ``threshold`` and keep a running log Z. The walkers start from an annealed population, so
            the weights are right from the first step. Unweighted walkers start as draws of the base and
            give no log Z.
        threshold: of the ESS, as a fraction of P.
        num_passive: further weighted walkers that only estimate log Z. Walkers that weigh a change of the
            parameters which they have chosen themselves find log Z too low, by about ``rate · Var(∇U) / ESS`` at each
            step; passive ones had no part in it. With none, log Z is that of the P walkers.
    """

    num_walkers: int = 1000
    kernel: Kernel = field(default_factory=MALA)
    num_moves: int = 1
    weighted: bool = False
    threshold: float = 0.5
    num_passive: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "num_walkers", "num_moves")
        check_type(self, "kernel", Kernel, "ULA(), MALA() or Underdamped()")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"Persistent: threshold must lie between 0 and 1, got {self.threshold!r}.")
        count("Persistent: num_passive", self.num_passive, least=0)
        if self.weighted and not isinstance(self.kernel, ULA | MALA):
            raise ValueError(
                f"Persistent(weighted=True) has Jarzynski increments for ULA and MALA, not for "
                f"{type(self.kernel).__name__}: choose one of these kernels or weighted=False."
            )
        if self.num_passive and not self.weighted:
            raise ValueError("Persistent: num_passive walkers estimate log Z by their weights: pass weighted=True.")

    @property
    def shares_gradient(self) -> bool:  # type: ignore[override]
        """Weights need densities at two parameters, so only unweighted walkers share."""
        return not self.weighted

    def init(self, rng_key: Array, density: TiltedDensity) -> WalkerState:
        """As :meth:`WalkerStrategy.init`."""
        if self.weighted:
            key_anneal, key_draw = random.split(rng_key)
            num = self.num_walkers + self.num_passive
            start = anneal(key_anneal, density, num, num_moves=5, stage_ess=0.9, max_temps=200)
            x, log_z = equally_weighted(key_draw, start, num), start.log_z
            log_density = density.log_density(x)
        else:
            x, log_density = density.sample_base(rng_key, self.num_walkers), None
            log_z = jnp.full(density.log_base(x).shape[1:], jnp.nan, x.dtype)
        shape = density.log_base(x).shape
        momentum = jnp.zeros_like(x) if self.kernel.has_momentum else None
        adapt = self.kernel.init({"x": x}, len(shape))
        return WalkerState(x, jnp.zeros(shape, x.dtype), log_density, momentum, log_z, adapt)

    def prepare(
        self, rng_key: Array, density: TiltedDensity, state: WalkerState, particles: Array | None = None
    ) -> tuple[Walkers, WalkerState, Info]:
        """As :meth:`WalkerStrategy.prepare`."""
        P, log_weight = self.num_walkers, state.log_weight
        judging = log_weight[P:] if self.num_passive else log_weight
        info = {"log_z": jnp.mean(state.log_z + log_mean_exp(judging))} if self.weighted else {}
        return Walkers(state.position[:P], normalised(log_weight[:P])), state, info

    def advance(
        self,
        rng_key: Array,
        density: TiltedDensity,
        following: TiltedDensity,
        state: WalkerState,
        known: tuple[Array, Array] | None,
    ) -> tuple[WalkerState, Info]:
        """As :meth:`WalkerStrategy.advance`."""
        if not self.weighted:
            state, accept = self._move(rng_key, density, state, known)
            return state, {"accept": accept}
        key_move, key_resample = random.split(rng_key)
        if isinstance(self.kernel, ULA):
            state, accept = self._jarzynski_ula(key_move, density, following, state)
        else:
            log_density = following.log_density(state.position)
            log_weight = state.log_weight + log_density - state.log_density
            state, accept = self._move(key_move, following, state._replace(log_weight=log_weight), None)
        fraction = jnp.min(ess(state.log_weight[: self.num_walkers])) / self.num_walkers
        state, resampled = self._resampled(key_resample, state)
        return state, {"accept": accept, "ess": fraction, "resampled": jnp.mean(resampled * 1.0)}

    def _resampled(self, rng_key: Array, state: WalkerState) -> tuple[WalkerState, Array]:
        """Walkers and passive walkers, each resampled among themselves, and whether the former were."""
        P, cached = self.num_walkers, (state.position, state.log_density)
        first = jax.tree.map(lambda a: a[:P], cached)
        log_weight, cached_p, resampled = resample(rng_key, state.log_weight[:P], first, self.threshold)
        if self.num_passive:
            rest, key = jax.tree.map(lambda a: a[P:], cached), random.fold_in(rng_key, 1)
            passive, cached_q, _ = resample(key, state.log_weight[P:], rest, self.threshold)
            log_weight = jnp.concatenate([log_weight, passive])
            cached_p = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cached_p, cached_q)
        x, log_density = cached_p
        return state._replace(position=x, log_density=log_density, log_weight=log_weight), resampled

    def _move(
        self, rng_key: Array, density: TiltedDensity, state: WalkerState, known: tuple[Array, Array] | None
    ) -> tuple[WalkerState, Array]:
        """``num_moves`` moves at fixed parameters."""
        start = (state.position, state.momentum, state.adapt)
        new = moved(self.kernel, self.num_moves, rng_key, density, *start, known)
        log_density = new.log_density if state.log_density is not None else None
        state = state._replace(position=new.position, momentum=new.momentum, adapt=new.adapt, log_density=log_density)
        return state, new.accept

    def _jarzynski_ula(
        self, rng_key: Array, density: TiltedDensity, following: TiltedDensity, state: WalkerState
    ) -> tuple[WalkerState, Array]:
        """Unadjusted moves at ``θ_k``, weighted towards ``θ_{k+1}`` at the last of them."""
        vg = batched_value_and_grad(density.log_density)
        vg_next = batched_value_and_grad(following.log_density)
        x, adapt, log_weight = state.position, state.adapt, state.log_weight
        here = (x, *vg(x))
        for i, key in enumerate(random.split(rng_key, self.num_moves)):
            h = jnp.exp(adapt.log_step)
            point = Point({"x": here[0]}, here[1], {"x": here[2]})
            moved, info = self.kernel.move(key, lambda p: (None, p), point, adapt)
            adapt = self.kernel.adapt(adapt, info, point)
            y = moved.position["x"]
            there = (y, *(vg_next(y) if i == self.num_moves - 1 else vg(y)))
            log_weight = log_weight + ula_increment(here, there, h, log_weight.ndim)
            here = there
        state = state._replace(position=here[0], log_density=here[1], log_weight=log_weight, adapt=adapt)
        return state, jnp.ones(())


@dataclass(frozen=True)
class Annealed(WalkerStrategy):
    """Walkers annealed afresh from the base at every step, by sequential Monte Carlo.

    They have no memory that could go wrong; only the step sizes of their moves are carried. Reliable where a
    few dozen temperatures suffice; in higher dimensions see :class:`~numpyro_ebipla.walkers.tempered.Tempered`.

    Args:
        num_walkers: P.
        num_moves: MALA moves at each temperature.
        stage_ess: see :func:`~numpyro_ebipla.smc.anneal.anneal`.
        max_temps: largest number of temperatures.
    """

    num_walkers: int = 256
    num_moves: int = 1
    stage_ess: float = 0.8
    max_temps: int = 50
    per_datum = True
    brake_gap = True

    def __post_init__(self) -> None:
        check_counts(self, "num_walkers", "num_moves", "max_temps")
        check_number(self, "stage_ess", below=1.0)

    def init(self, rng_key: Array, density: TiltedDensity) -> WalkerState:
        """As :meth:`WalkerStrategy.init`."""
        x = density.sample_base(rng_key, 1)
        shape = density.log_base(x).shape[1:]
        start = anneal(rng_key, density, self.num_walkers, num_moves=5, rate=0.3)
        return WalkerState(None, None, None, None, jnp.zeros(shape, x.dtype), start.log_step)

    def prepare(
        self, rng_key: Array, density: TiltedDensity, state: WalkerState, particles: Array | None = None
    ) -> tuple[Walkers, WalkerState, Info]:
        """As :meth:`WalkerStrategy.prepare`."""
        population = anneal(
            rng_key,
            density,
            self.num_walkers,
            state.adapt,
            num_moves=self.num_moves,
            stage_ess=self.stage_ess,
            max_temps=self.max_temps,
        )
        state = state._replace(adapt=population.log_step, log_z=population.log_z)
        info = {
            "accept": population.accept_prob,
            "ess": population.ess,
            "log_z": jnp.mean(population.log_z),
            "num_temps": population.num_temps,
        }
        return Walkers(population.position, normalised(population.log_weight)), state, info
