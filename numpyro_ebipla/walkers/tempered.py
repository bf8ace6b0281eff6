"""Persistent parallel tempering of prior walkers: the default, see :class:`Tempered`."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, random

from numpyro_ebipla._core.state import WalkerState
from numpyro_ebipla._core.tree import batched_value_and_grad, chain_select
from numpyro_ebipla._core.validate import check_counts, check_number, count
from numpyro_ebipla.kernels.metropolis import Shape, metropolis
from numpyro_ebipla.smc.density import TARGET_ACCEPT, TiltedDensity
from numpyro_ebipla.smc.weights import log_mean_exp, normalised
from numpyro_ebipla.walkers.base import Info, Restraint, Walkers, WalkerStrategy

#: Walkers of each rung whose energies enter the restraint.
RESTRAINING = 16


class Ladder(NamedTuple):
    """Adaptation of parallel tempering over K rungs.

    Attributes:
        temperature: ``[K]``, from 0 (the base) to 1 (the prior).
        log_step: ``[K − 1]`` log step sizes of the rungs above the base.
        rejection: ``[K − 1]`` running mean of the probability that neighbours do not swap.
        count: number of steps.
    """

    temperature: Array
    log_step: Array
    rejection: Array
    count: Array  # type: ignore[assignment]


@dataclass(frozen=True)
class Tempered(WalkerStrategy):
    r"""Persistent parallel tempering between the base and the prior (Geyer, 1991).

    K rungs of P walkers target ``log p_0 − t_k E``. At every training step the rung at ``t = 0`` is redrawn
    exactly, neighbours swap by the deterministic even-odd scheme, and every walker makes ``num_moves`` MALA
    moves, all rungs in one batched evaluation. Walkers at ``t = 1`` so have thousands of moves behind them, and
    yet each has come from the base a few dozen steps ago: they neither need to cross barriers nor can they
    follow the data while the prior itself goes wrong. The ladder is moved so that all neighbours swap equally
    often (Syed et al., 2021, *Non-reversible parallel tempering*); log Z comes from Bennett's acceptance
    ratio between neighbours.

    Args:
        num_walkers: P, the walkers at each rung.
        num_rungs: K, with both ends; at least 2.
        num_moves: MALA moves per training step.
        restraint: ``(begin, full)``, for the barrier between base and prior (the sum over the rungs of the
            rejections between neighbours): from the first on the contrast gets a penalty on it, whose strength
            is one at the second; None for never.
        trust: the most that a step may change the energy by, as a standard deviation over the walkers in nats:
            larger updates of its parameters are shortened. It falls like ``1/√(1 + k/1000)``. None for no limit.

    The sharper the energy, the higher the barrier and the longer a walker's way from the base. Left to itself
    a flexible energy sharpens until its walkers are cut off, and then goes wrong with nothing to be seen in the
    contrast. The restraint holds the barrier while the energy's shape still follows the data.
    """

    num_walkers: int = 128
    num_rungs: int = 8
    num_moves: int = 1
    restraint: tuple[float, float] | None = (1.8, 3.0)
    trust: float | None = 0.12
    brake_gap = True

    def __post_init__(self) -> None:
        check_counts(self, "num_walkers", "num_moves")
        count("Tempered: num_rungs", self.num_rungs, least=2)
        if self.trust is not None:
            check_number(self, "trust")
        if self.restraint is not None and not (len(self.restraint) == 2 and 0 <= self.restraint[0] < self.restraint[1]):
            raise ValueError(f"Tempered: restraint must be (begin, full) with begin < full, got {self.restraint!r}.")

    def init(self, rng_key: Array, density: TiltedDensity) -> WalkerState:
        """As :meth:`WalkerStrategy.init`."""
        key_base, key_moves = random.split(rng_key)
        shape = (self.num_rungs, self.num_walkers)
        x = density.sample_base(key_base, shape[0] * shape[1])
        ladder = Ladder(
            temperature=jnp.linspace(0, 1, shape[0], dtype=x.dtype) ** 2,
            log_step=jnp.full((shape[0] - 1,), jnp.log(0.05), x.dtype),
            rejection=jnp.full((shape[0] - 1,), 0.1, x.dtype),
            count=jnp.zeros((), jnp.int32),
        )
        log_z = jnp.zeros(density.log_base(x).shape[1:], x.dtype)
        state = WalkerState(x.reshape(shape + x.shape[1:]), None, None, None, log_z, ladder)

        def warm_up(state: WalkerState, key: Array) -> tuple[WalkerState, None]:
            return self.prepare(key, density, state)[1], None

        return jax.lax.scan(warm_up, state, random.split(key_moves, 10 * self.num_rungs))[0]

    def prepare(
        self, rng_key: Array, density: TiltedDensity, state: WalkerState, particles: Array | None = None
    ) -> tuple[Walkers, WalkerState, Info]:
        """As :meth:`WalkerStrategy.prepare`."""
        key_base, key_swap, *key_moves = random.split(rng_key, 2 + self.num_moves)
        ladder = state.adapt
        fresh = density.sample_base(key_base, self.num_walkers)
        known = self._evaluate(density, state.position.at[0].set(fresh))
        known = swap(key_swap, known, ladder)

        # The base is redrawn, so its rung needs no moves; its spread sets the scale of all proposals.
        variance = jnp.maximum(jnp.var(fresh, axis=0), 1e-12)
        moving = jax.tree.map(lambda a: a[1:], known)
        log_step, accept = ladder.log_step, jnp.zeros(self.num_rungs - 1)
        for key in key_moves:
            moving, prob = self._move(key, density, ladder.temperature[1:], log_step, variance, moving)
            log_step = log_step + _adaptation_rate(ladder.count) * (prob - TARGET_ACCEPT)
            accept += prob / self.num_moves
        known = jax.tree.map(lambda a, b: a.at[1:].set(b), known, moving)

        log_z = _bennett(known[2], ladder.temperature)
        weight = _weights(known[2], ladder.temperature, log_z)
        info = {
            "accept": accept.mean(),
            "swap": 1 - ladder.rejection.max(),
            "log_z": jnp.mean(log_z[-1]),
            "ess": jnp.mean(1 / jnp.sum(weight**2, 0)) / self.num_walkers,
        }
        ladder = _adapt_ladder(ladder._replace(log_step=log_step), known[2])
        state = state._replace(position=known[0], adapt=ladder, log_z=log_z[-1])
        restraint = None
        if self.restraint is not None:
            begin, full = self.restraint
            barrier = ladder.rejection.sum()
            strength = jnp.maximum(barrier - begin, 0.0) / (full - begin)
            restraint = Restraint(known[0][:, :RESTRAINING], ladder.temperature, strength)
            info["barrier"] = barrier
        everywhere = known[0].reshape((-1, *known[0].shape[2:]))
        return Walkers(everywhere, weight, restraint), state, info

    def shown(self, rng_key: Array, walkers: Walkers, state: WalkerState) -> Array:
        """As :meth:`WalkerStrategy.shown`: those of the last rung, which need no weights."""
        del rng_key, walkers
        return state.position[-1]

    def _evaluate(self, density: TiltedDensity, x: Array) -> tuple[Array, ...]:
        """``(x, log base, energy, gradients)`` of walkers ``[rungs, P, ...]``, in one batch."""
        flat = x.reshape((-1, *x.shape[2:]))
        base, grad_base = batched_value_and_grad(density.log_base)(flat)
        energy, grad_energy = batched_value_and_grad(density.energy)(flat)
        lead = x.shape[:2]
        return x, *(a.reshape(lead + a.shape[1:]) for a in (base, energy, grad_base, grad_energy))

    def _move(
        self,
        rng_key: Array,
        density: TiltedDensity,
        temperature: Array,
        log_step: Array,
        variance: Array,
        known: tuple[Array, ...],
    ) -> tuple[tuple[Array, ...], Array]:
        """One MALA move of all rungs above the base, and its acceptance by rung."""

        def by_rung(a: Array, ndim: int) -> Array:
            return a.reshape((-1,) + (1,) * (ndim - 1))

        def tempered(known: tuple[Array, ...]) -> tuple[Array, Array]:
            _, base, energy, grad_base, grad_energy = known
            t = by_rung(temperature, energy.ndim)
            return base - t * energy, grad_base - by_rung(temperature, grad_base.ndim) * grad_energy

        def target(x: Array) -> tuple[Array, Array, tuple[Array, ...]]:
            new = self._evaluate(density, x)
            return *tempered(new), new

        x = known[0]
        # A step size per rung: fold it into the proposal's variance.
        scale = by_rung(jnp.exp(log_step), x.ndim) * variance
        accept, new, prob = metropolis(rng_key, target, (x, *tempered(known)), jnp.ones((), x.dtype), Shape(scale))
        return chain_select(accept, new[3], known), prob.reshape(prob.shape[0], -1).mean(1)


def swap(rng_key: Array, known: Any, ladder: Ladder) -> Any:
    """Exchange walkers between neighbouring rungs, even pairs on even steps and odd pairs on odd ones.

    Args:
        rng_key: a PRNG key.
        known: arrays ``[K, P, ...]`` that belong to the walkers, the third of them the energies ``[K, P]``.
        ladder: temperatures and the count that decides the parity.
    """
    energy = known[2]
    num = energy.shape[0]
    gap = jnp.diff(ladder.temperature).reshape((-1,) + (1,) * (energy.ndim - 1))
    log_accept = gap * (energy[1:] - energy[:-1])
    active = (jnp.arange(num - 1) + ladder.count) % 2 == 0
    active = active.reshape(gap.shape)
    up = active & (jnp.log(random.uniform(rng_key, log_accept.shape)) < log_accept)
    none = jnp.zeros_like(up[:1])
    rung = jnp.arange(num).reshape((-1,) + (1,) * (energy.ndim - 1))
    source = rung + jnp.concatenate([up, none]) - jnp.concatenate([none, up])

    def exchange(a: Array) -> Array:
        return jnp.take_along_axis(a, source.reshape(source.shape + (1,) * (a.ndim - source.ndim)), 0)

    return jax.tree.map(exchange, known)


def _adaptation_rate(count: Array) -> Array:
    return jnp.maximum(1.0 / (1 + count) ** 0.5, 0.05)


def _adapt_ladder(ladder: Ladder, energy: Array) -> Ladder:
    """Move the temperatures towards equal rejection between neighbours (Syed et al., 2021, eq. 23)."""
    t = ladder.temperature
    gap = jnp.diff(t).reshape((-1,) + (1,) * (energy.ndim - 1))
    refused = -jnp.expm1(jnp.minimum(gap * (energy[1:] - energy[:-1]), 0.0))
    refused = refused.reshape(refused.shape[0], -1).mean(1)
    refused = jnp.where(jnp.isfinite(refused), refused, 1.0)
    rejection = ladder.rejection + 0.05 * (refused - ladder.rejection)
    barrier = jnp.concatenate([jnp.zeros(1, t.dtype), jnp.cumsum(rejection + 1e-3)])
    equal = jnp.interp(jnp.linspace(0, 1, t.shape[0], dtype=t.dtype) * barrier[-1], barrier, t)
    t = (t + 0.02 * (equal - t)).at[0].set(0.0).at[-1].set(1.0)
    return ladder._replace(temperature=t, rejection=rejection, count=ladder.count + 1)


def _bennett(energy: Array, temperature: Array) -> Array:
    """Log Z of every rung by Bennett's acceptance ratio between neighbours: ``[K]``, or ``[K, D]``."""
    gap = jnp.diff(temperature).reshape((-1,) + (1,) * (energy.ndim - 1))
    forward, backward = -gap * energy[:-1], gap * energy[1:]
    ratio = log_mean_exp((0.5 * forward).swapaxes(0, 1)) - log_mean_exp((0.5 * backward).swapaxes(0, 1))
    for _ in range(4):
        c = ratio[:, None]
        up = log_mean_exp(jax.nn.log_sigmoid(forward - c).swapaxes(0, 1))
        down = log_mean_exp(jax.nn.log_sigmoid(backward + c).swapaxes(0, 1))
        ratio = ratio + up - down
    return jnp.concatenate([jnp.zeros_like(ratio[:1]), jnp.cumsum(ratio, 0)])


def _weights(energy: Array, temperature: Array, log_z: Array) -> Array:
    r"""Weights for the prior of the walkers of all rungs, ``[K P]`` or ``[K P, D]``.

    Together they are draws of the mixture ``(1/K) \sum_k p_0 e^{−t_k E} / Z_k``, wherever each stands (Shirts and
    Chodera, 2008, eq. 15).
    """
    log_mixture = jax.nn.logsumexp(jax.vmap(lambda t, z: -t * energy - z)(temperature, log_z), axis=0)
    log_weight = (-energy - log_mixture).reshape((-1, *energy.shape[2:]))
    return normalised(log_weight)
