"""Prior walkers that persist over the steps, with Jarzynski weights or without."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array, random

from numpyro_ebipla._core.state import WalkerState
from numpyro_ebipla._core.tree import batched_value_and_grad
from numpyro_ebipla._core.validate import check_counts, check_share, check_type, count
from numpyro_ebipla.kernels.base import Kernel, Point
from numpyro_ebipla.kernels.langevin import ULA
from numpyro_ebipla.kernels.mala import MALA
from numpyro_ebipla.smc.anneal import anneal, draw_equally
from numpyro_ebipla.smc.density import TiltedDensity
from numpyro_ebipla.smc.weights import ess, log_mean_exp, normalised, resample, ula_increment
from numpyro_ebipla.walkers.base import Info, Walkers, WalkerStrategy, moved


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
        check_share(self, "threshold")
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
            start = anneal(key_anneal, density, num)
            x, log_z = draw_equally(key_draw, start.position, start.log_weight, num), start.log_z
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
