"""Prior walkers that persist over the steps, with Jarzynski weights or without."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, final

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_ebipla._core.state import Adaptation
from numpyro_ebipla._core.tree import batched_value_and_grad
from numpyro_ebipla._core.validate import as_count, check_counts, check_share, check_type
from numpyro_ebipla.kernels.base import AbstractKernel, Evaluation, Point
from numpyro_ebipla.kernels.langevin import ULA
from numpyro_ebipla.kernels.mala import MALA
from numpyro_ebipla.smc.anneal import anneal, draw_equally
from numpyro_ebipla.smc.density import TiltedDensity
from numpyro_ebipla.smc.weights import ess, log_mean_exp, normalised, resample, resample_to, ula_increment
from numpyro_ebipla.walkers.base import (
    AbstractWalkers,
    Info,
    Walkers,
    chain_shape,
    draw_resampled,
    move_walkers,
)

#: Steps that one half of the walkers is on duty while the other rests, where there are passive walkers: long enough
#: for walkers to forget where those stood that they are copies of.
TURN = 20


class Jarzynski(NamedTuple):
    """What weighted walkers carry besides their weights.

    Attributes:
        log_density: ``[P]`` (or ``[P, D]``) where the walkers stand, at the parameters that they follow.
        log_z: log normaliser relative to the base distribution, when all weights were one.
    """

    log_density: Array
    log_z: Array


class PersistentState(NamedTuple):
    """Persistent walkers.

    Attributes:
        position: ``[P, *event]``; with passive walkers the two halves of the others first, ``[P + num_passive, …]``.
        log_weight: ``[P]`` (or ``[P, D]``) unnormalised log weights, zero if the walkers are unweighted.
        momentum: like ``position``, of underdamped kernels, else None.
        adapt: of the kernel.
        jarzynski: of weighted walkers, else None.
    """

    position: Array
    log_weight: Array
    momentum: Array | None
    adapt: Adaptation
    jarzynski: Jarzynski | None


class Weighted(NamedTuple):
    """Weighted walkers on their way: positions, log weights, and log densities at the parameters that come."""

    position: Array
    log_weight: Array
    log_density: Array


@final
@dataclass(frozen=True)
class Persistent(AbstractWalkers):
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
        num_passive: further weighted walkers, which have no part in the gradient. Walkers that weigh a change of the
            parameters which they have chosen themselves find log Z too low, by about ``rate · Var(∇U) / ESS`` at each
            step: in every mode by another amount, so that with time the masses of modes come out wrong. Passive
            walkers estimate log Z without that, and the P walkers are drawn anew from them: half of these are
            on duty for 20 steps, are relieved by the other half, begin again as draws of the passive ones and rest.
            With none, as in the paper, all P are on duty and log Z is theirs. How well masses are known is a matter
            of the number of passive walkers: as modes part, each keeps the share that it happens to have.
    """

    num_walkers: int = 1000
    kernel: AbstractKernel = field(default_factory=MALA)
    num_moves: int = 1
    weighted: bool = False
    threshold: float = 0.5
    num_passive: int = 0
    persists: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(self, "num_walkers", "num_moves")
        check_type(self, "kernel", AbstractKernel, "ULA(), MALA() or Underdamped()")
        check_share(self, "threshold")
        as_count("Persistent: num_passive", self.num_passive, least=0)
        if self.weighted and not isinstance(self.kernel, ULA | MALA):
            raise ValueError(
                f"Persistent(weighted=True) has Jarzynski increments for ULA and MALA, not for "
                f"{type(self.kernel).__name__}: choose one of these kernels or weighted=False."
            )
        if self.num_passive and not self.weighted:
            raise ValueError("Persistent: num_passive walkers estimate log Z by their weights: pass weighted=True.")
        if self.num_passive and self.num_walkers % 2:
            raise ValueError(
                f"Persistent: halves of the walkers take turns where some are passive: num_walkers must be even, got "
                f"{self.num_walkers}."
            )

    @property
    def shares_gradient(self) -> bool:
        """Whether the walkers are unweighted: weights need densities at two parameters."""
        return not self.weighted

    def init(self, rng_key: Array, density: TiltedDensity) -> PersistentState:
        """Draw walkers from the base, or from an annealed population if they are weighted."""
        jarzynski = None
        if self.weighted:
            key_anneal, key_draw = random.split(rng_key)
            num = self.num_walkers + self.num_passive
            start = anneal(key_anneal, density, num)
            x = draw_equally(key_draw, start.position, start.log_weight, num)
            jarzynski = Jarzynski(density.log_density(x), start.log_z)
        else:
            x = density.sample_base(rng_key, self.num_walkers)
        shape = chain_shape(density, x)
        momentum = jnp.zeros_like(x) if self.kernel.has_momentum else None
        return PersistentState(x, jnp.zeros(shape, x.dtype), momentum, self.kernel.init(x, len(shape)), jarzynski)

    def prepare(
        self, rng_key: Array, density: TiltedDensity, state: PersistentState, particles: Array | None = None
    ) -> tuple[Walkers, PersistentState, Info]:
        """Return the walkers as they stand, and log Z if they are weighted."""
        del rng_key, density, particles
        if state.jarzynski is None:
            return Walkers(state.position, normalised(state.log_weight)), state, {}
        x, log_weight = self._on_duty(self._num_steps(state), (state.position, state.log_weight))
        judging = state.log_weight[self.num_walkers :] if self.num_passive else log_weight
        info = {"log_z": jnp.mean(state.jarzynski.log_z + log_mean_exp(judging))}
        return Walkers(x, normalised(log_weight)), state, info

    def advance(
        self,
        rng_key: Array,
        density: TiltedDensity,
        following: TiltedDensity,
        state: PersistentState,
        known: Evaluation | None,
    ) -> tuple[PersistentState, Info]:
        """Move the walkers at ``θ_k``, or weigh and move them to ``θ_{k+1}``."""
        if state.jarzynski is None:
            value, gradient = known or (None, None)
            start = Point(state.position, value, gradient, state.momentum)
            new, adapt, accept = move_walkers(self.kernel, self.num_moves, rng_key, density, start, state.adapt)
            return state._replace(position=new.position, momentum=new.momentum, adapt=adapt), {"accept": accept}
        key_move, key_resample = random.split(rng_key)
        if isinstance(self.kernel, ULA):
            weighted, adapt, accept = self._weigh_unadjusted(key_move, density, following, state)
        else:
            weighted, adapt, accept = self._weigh_adjusted(key_move, following, state, state.jarzynski.log_density)
        num_steps = self._num_steps(state)
        log_weight = self._on_duty(num_steps, weighted.log_weight)
        fraction = jnp.min(ess(log_weight)) / log_weight.shape[0]
        (x, log_weight, log_density), resampled = self._resample(key_resample, weighted, num_steps)
        jarzynski = state.jarzynski._replace(log_density=log_density)
        state = PersistentState(x, log_weight, None, adapt, jarzynski)
        return state, {"accept": accept, "ess": fraction, "resampled": jnp.mean(resampled * 1.0)}

    def draw(self, rng_key: Array, walkers: Walkers, state: PersistentState) -> Array:
        """Resample the walkers: the passive ones, if there are any."""
        if not self.num_passive:
            return draw_resampled(rng_key, walkers)
        P = self.num_walkers
        return draw_equally(rng_key, state.position[P:], state.log_weight[P:], P)

    def _num_steps(self, state: PersistentState) -> Array:
        """Return the number of steps so far: kernels count their moves."""
        return state.adapt.count // self.num_moves

    def _first_on_duty(self, num_steps: Array) -> Array:
        """Return where the half begins that is on duty after ``num_steps`` steps."""
        return self.num_walkers // 2 * (num_steps // TURN % 2)

    def _on_duty(self, num_steps: Array, arrays: Any) -> Any:
        """Return what belongs to the walkers that enter the gradient, of arrays ``[P + num_passive, …]``."""
        if not self.num_passive:
            return arrays
        first, half = self._first_on_duty(num_steps), self.num_walkers // 2
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, first, half), arrays)

    def _resample(self, rng_key: Array, walkers: Weighted, num_steps: Array) -> tuple[Weighted, Array]:
        """Resample each group of walkers, and relieve the half whose turn ends with step ``num_steps``.

        Also say whether the walkers that log Z is known by were resampled.
        """

        def among(key: Array, group: slice) -> tuple[Weighted, Array]:
            mine = jax.tree.map(lambda a: a[group], walkers)
            cached = (mine.position, mine.log_density)
            log_weight, (x, log_density), resampled = resample(key, mine.log_weight, cached, self.threshold)
            return Weighted(x, log_weight, log_density), resampled

        if not self.num_passive:
            return among(rng_key, slice(None))
        P, half = self.num_walkers, self.num_walkers // 2
        key_passive, key_relief, key_first, key_second = random.split(rng_key, 4)
        passive, resampled = among(key_passive, slice(P, None))
        halves = among(key_first, slice(half))[0], among(key_second, slice(half, P))[0]
        together = jax.tree.map(lambda *a: jnp.concatenate(a), *halves, passive)

        def relieve(walkers: Weighted) -> Weighted:
            cached = (passive.position, passive.log_density)
            log_weight, (x, log_density) = resample_to(key_relief, half, passive.log_weight, cached)
            first = self._first_on_duty(num_steps)
            put = lambda a, fresh: lax.dynamic_update_slice_in_dim(a, fresh, first, 0)
            return jax.tree.map(put, walkers, Weighted(x, log_weight, log_density))

        ends = (num_steps + 1) % TURN == 0
        return lax.cond(ends, relieve, lambda walkers: walkers, together), resampled

    def _weigh_adjusted(
        self, rng_key: Array, following: TiltedDensity, state: PersistentState, log_density: Array
    ) -> tuple[Weighted, Adaptation, Array]:
        """Weigh the walkers by what ``θ_{k+1}`` makes of them, and move them there."""
        log_weight = state.log_weight + following.log_density(state.position) - log_density
        start = Point(state.position, None, None)
        new, adapt, accept = move_walkers(self.kernel, self.num_moves, rng_key, following, start, state.adapt)
        assert new.log_density is not None
        return Weighted(new.position, log_weight, new.log_density), adapt, accept

    def _weigh_unadjusted(
        self, rng_key: Array, density: TiltedDensity, following: TiltedDensity, state: PersistentState
    ) -> tuple[Weighted, Adaptation, Array]:
        """Move the walkers at ``θ_k``, and weigh them towards ``θ_{k+1}`` at the last of the moves.

        :func:`.run_moves` does not serve here: an increment needs the gradients at both ends of each move, the last
        one's under another density.
        """
        now, then = (batched_value_and_grad(at.log_density) for at in (density, following))
        adapt, log_weight = state.adapt, state.log_weight
        here = Point(state.position, *now(state.position))
        for i, key in enumerate(random.split(rng_key, self.num_moves)):
            h, target = jnp.exp(adapt.log_step), then if i == self.num_moves - 1 else now
            moved, info = self.kernel.move(key, target, here, adapt)
            adapt = self.kernel.adapt(adapt, info, here)
            there = Point(moved.position, *target(moved.position))
            log_weight = log_weight + ula_increment(_known(here), _known(there), h, log_weight.ndim)
            here = there
        x, log_density, _ = _known(here)
        return Weighted(x, log_weight, log_density), adapt, jnp.ones(())


def _known(point: Point) -> tuple[Array, Array, Array]:
    """Return the position, the log density and its gradient of a point that has all three."""
    assert point.log_density is not None and point.gradient is not None
    return point.position, point.log_density, point.gradient
