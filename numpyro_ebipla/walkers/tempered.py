"""Persistent parallel tempering of prior walkers: the default, see :class:`Tempered`."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import jax
import jax.numpy as jnp
from jax import Array, random

from numpyro_ebipla._core.validate import as_count, check_counts, check_number
from numpyro_ebipla.smc.control import reweighted
from numpyro_ebipla.smc.density import TARGET_ACCEPT, Evaluated, TiltedDensity, move_tempered
from numpyro_ebipla.smc.features import choose_fields
from numpyro_ebipla.smc.reference import Reference
from numpyro_ebipla.smc.weights import log_mean_exp, normalised
from numpyro_ebipla.walkers.base import AbstractPrepared, Info, LadderSample, Walkers, chain_shape

#: Walkers of each rung that are handed out for the restraint, at the price of their energies' gradient.
RESTRAINING = 16
#: Step size before any adaptation, in units of the base's variance: short, as the prior may be narrower.
FIRST_STEP = 0.05
#: Least rate, as in ``1/√k``, at which log step sizes follow the acceptance: the energy moves on.
LEAST_STEP_RATE = 0.05
#: Rate of the running means of rejections: some 20 steps, so that a ladder can follow the energy.
REJECTION_RATE = 0.05
#: Rejection between neighbours before any was seen.
FIRST_REJECTION = 0.1
#: Added to every rejection where the ladder is divided, so that rungs between which all swap stay apart.
LEAST_REJECTION = 1e-3
#: Share of the way to the equal division that temperatures go at a step: less than rejections are known to.
LADDER_RATE = 0.02
#: Rate at which the reference follows the particles: the last twenty steps, as a minibatch may be small.
REFERENCE_RATE = 0.05
#: Steps for each rung that walkers warm up before the fit: as many as a few ways from the base to the prior.
WARM_UP = 10
#: Newton-like rounds of Bennett's equation; neighbours overlap, so that few suffice.
BENNETT_ROUNDS = 4


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


class TemperedState(NamedTuple):
    """Walkers of all rungs.

    Attributes:
        position: ``[K, P, *event]``.
        ladder: their adaptation.
        reference: what the ladder starts from, with the base.
    """

    position: Array
    ladder: Ladder
    reference: Reference


@final
@dataclass(frozen=True)
class Tempered(AbstractPrepared):
    r"""Persistent parallel tempering to the prior (Geyer, 1991), from where the particles are.

    K rungs of P walkers target ``log q − t_k V``, ``V = E − log p_0 + log q``. Here ``q`` is half the base and half a
    normal law with the particles' mean and covariance, see :mod:`~numpyro_ebipla.smc.reference`: a base that is far
    from the data, or of another scale, does no harm. At every training step the rung at ``t = 0`` is redrawn
    exactly, neighbours swap by the deterministic even-odd scheme, and every walker makes ``num_moves`` MALA
    moves, all rungs in one batched evaluation. Walkers at ``t = 1`` so have thousands of moves behind them, and
    yet each has been drawn afresh a few dozen steps ago: they neither need to cross barriers nor can they
    follow the data while the prior itself goes wrong. The ladder is moved so that all neighbours swap equally
    often (Syed et al., 2022, *Non-reversible parallel tempering*); log Z comes from Bennett's acceptance
    ratio between neighbours.

    Args:
        num_walkers: P, the walkers at each rung.
        num_rungs: K, with both ends; at least 2.
        num_moves: MALA moves per training step.
        restraint: ``(begin, full)``, for the barrier between ``q`` and the prior (the sum over the rungs of the
            rejections between neighbours): from the first on the contrast gets a penalty on it, whose strength
            is one at the second; None for never.
        trust: the most that a step may change the energy by, as a standard deviation over the walkers in nats:
            larger updates of its parameters are shortened. It falls like ``1/√(1 + k/1000)``. None for no limit.

    The sharper the energy, the higher the barrier and the longer a walker's way from its start. Left to itself
    a flexible energy sharpens until its walkers are cut off, and then goes wrong with nothing to be seen in the
    contrast. The restraint holds the barrier while the energy's shape still follows the data.
    """

    num_walkers: int = 128
    num_rungs: int = 8
    num_moves: int = 1
    restraint: tuple[float, float] | None = (1.8, 3.0)
    trust: float | None = 0.12
    persists: ClassVar[bool] = True
    follows_particles: ClassVar[bool] = True
    brake_gap: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(self, "num_walkers", "num_moves")
        as_count("Tempered: num_rungs", self.num_rungs, least=2)
        if self.trust is not None:
            check_number(self, "trust")
        if self.restraint is not None and not (len(self.restraint) == 2 and 0 <= self.restraint[0] < self.restraint[1]):
            raise ValueError(f"Tempered: restraint must be (begin, full) with begin < full, got {self.restraint!r}.")

    def init(self, rng_key: Array, density: TiltedDensity) -> TemperedState:
        """Draw all rungs from the base and let them warm up."""
        key_base, key_moves = random.split(rng_key)
        shape = (self.num_rungs, self.num_walkers)
        x = density.sample_base(key_base, shape[0] * shape[1])
        ladder = Ladder(
            temperature=jnp.linspace(0, 1, shape[0], dtype=x.dtype) ** 2,
            log_step=jnp.full((shape[0] - 1,), jnp.log(FIRST_STEP), x.dtype),
            rejection=jnp.full((shape[0] - 1,), FIRST_REJECTION, x.dtype),
            count=jnp.zeros((), jnp.int32),
        )
        reference = Reference.of(x, len(chain_shape(density, x)))
        state = TemperedState(x.reshape(shape + x.shape[1:]), ladder, reference)

        def warm_up(state: TemperedState, key: Array) -> tuple[TemperedState, None]:
            return self.prepare(key, density, state)[1], None

        return jax.lax.scan(warm_up, state, random.split(key_moves, WARM_UP * self.num_rungs))[0]

    def prepare(
        self, rng_key: Array, density: TiltedDensity, state: TemperedState, particles: Array | None = None
    ) -> tuple[Walkers, TemperedState, Info]:
        """Redraw the base, swap neighbours, move all rungs above the base, and weigh the walkers of all."""
        key_base, key_swap, *key_moves = random.split(rng_key, 2 + self.num_moves)
        ladder, reference = state.ladder, state.reference
        if particles is not None:
            reference = reference.updated(particles, jnp.maximum(1.0 / (1 + ladder.count), REFERENCE_RATE))
        path = reference.mixed_with(density)
        fresh = path.sample_base(key_base, self.num_walkers)
        rungs = _evaluate(path, state.position.at[0].set(fresh))
        rungs = swap(key_swap, rungs, ladder)

        # The first rung is redrawn and needs no moves.
        variance = reference.variance.reshape(fresh.shape[1:])
        moving = jax.tree.map(lambda a: a[1:], rungs)
        log_step, accept = ladder.log_step, jnp.zeros(self.num_rungs - 1)
        for key in key_moves:
            moving, prob = _move(key, path, moving, ladder.temperature[1:], log_step, variance)
            log_step = log_step + _step_rate(ladder.count) * (prob - TARGET_ACCEPT)
            accept += prob / self.num_moves
        rungs = jax.tree.map(lambda a, b: a.at[1:].set(b), rungs, moving)

        log_z = _bennett(rungs.energy, ladder.temperature)
        weight = _weights(rungs.energy, ladder.temperature, log_z)
        info = {
            "accept": accept.mean(),
            "swap": 1 - ladder.rejection.max(),
            "log_z": jnp.mean(log_z[-1]),
            "ess": jnp.mean(1 / jnp.sum(weight**2, 0)) / self.num_walkers,
        }
        x, ladder = rungs.position, _adapt_ladder(ladder._replace(log_step=log_step), rungs.energy)
        few = x[:, :RESTRAINING]
        base = density.log_base(few.reshape((-1, *few.shape[2:])))
        log_base = rungs.log_base[:, :RESTRAINING]
        sample = LadderSample(few, log_base - base.reshape(log_base.shape), ladder.temperature, ladder.rejection.sum())
        if self.restraint is not None:
            info["barrier"] = sample.barrier
        state = TemperedState(x, ladder, reference)
        return Walkers(x.reshape((-1, *x.shape[2:])), weight, sample, _quiet(weight, rungs)), state, info

    def draw(self, rng_key: Array, walkers: Walkers, state: TemperedState) -> Array:
        """Return the walkers of the last rung, which need no weights."""
        del rng_key, walkers
        return state.position[-1]


def _evaluate(density: TiltedDensity, x: Array) -> Evaluated:
    """Return what is known of walkers ``[rungs, P, ...]``, computed in one batch."""
    lead = x.shape[:2]
    flat = density.evaluate(x.reshape((-1, *x.shape[2:])))
    return jax.tree.map(lambda a: a.reshape(lead + a.shape[1:]), flat)


def _move(
    rng_key: Array,
    density: TiltedDensity,
    here: Evaluated,
    temperature: Array,
    log_step: Array,
    variance: Array,
) -> tuple[Evaluated, Array]:
    """Make one MALA move of all rungs above the base; also return the acceptance by rung."""
    x = here.position
    # A step size per rung: fold it into the proposal's variance.
    scale = _by_rung(jnp.exp(log_step), x.ndim) * variance[None, None]
    step_size = jnp.ones((), x.dtype)
    there, prob = move_tempered(rng_key, lambda x: _evaluate(density, x), here, temperature, step_size, scale)
    return there, prob.reshape(prob.shape[0], -1).mean(1)


def _by_rung(values: Array, ndim: int) -> Array:
    """Return one value a rung in a shape that broadcasts to the rungs' arrays."""
    return values.reshape((-1,) + (1,) * (ndim - 1))


def swap(rng_key: Array, rungs: Evaluated, ladder: Ladder) -> Evaluated:
    """Exchange walkers between neighbouring rungs, even pairs on even steps and odd pairs on odd ones.

    Args:
        rng_key: a PRNG key.
        rungs: arrays ``[K, P, ...]`` that belong to the walkers, their energies ``[K, P]`` among them.
        ladder: temperatures and the count that decides the parity.
    """
    energy = rungs.energy
    num = energy.shape[0]
    gap = _by_rung(jnp.diff(ladder.temperature), energy.ndim)
    log_accept = gap * (energy[1:] - energy[:-1])
    active = (jnp.arange(num - 1) + ladder.count) % 2 == 0
    active = active.reshape(gap.shape)
    up = active & (jnp.log(random.uniform(rng_key, log_accept.shape)) < log_accept)
    none = jnp.zeros_like(up[:1])
    rung = _by_rung(jnp.arange(num), energy.ndim)
    source = rung + jnp.concatenate([up, none]) - jnp.concatenate([none, up])

    def exchange(a: Array) -> Array:
        return jnp.take_along_axis(a, source.reshape(source.shape + (1,) * (a.ndim - source.ndim)), 0)

    return jax.tree.map(exchange, rungs)


def _step_rate(count: Array) -> Array:
    """Return the rate at which log step sizes follow the acceptance."""
    return jnp.maximum(1.0 / (1 + count) ** 0.5, LEAST_STEP_RATE)


def _adapt_ladder(ladder: Ladder, energy: Array) -> Ladder:
    """Move the temperatures towards equal rejection between neighbours (Syed et al., 2022, eq. 23)."""
    t = ladder.temperature
    refused = -jnp.expm1(jnp.minimum(_by_rung(jnp.diff(t), energy.ndim) * (energy[1:] - energy[:-1]), 0.0))
    refused = refused.reshape(refused.shape[0], -1).mean(1)
    refused = jnp.where(jnp.isfinite(refused), refused, 1.0)
    rejection = ladder.rejection + REJECTION_RATE * (refused - ladder.rejection)
    barrier = jnp.concatenate([jnp.zeros(1, t.dtype), jnp.cumsum(rejection + LEAST_REJECTION)])
    equal = jnp.interp(jnp.linspace(0, 1, t.shape[0], dtype=t.dtype) * barrier[-1], barrier, t)
    t = (t + LADDER_RATE * (equal - t)).at[0].set(0.0).at[-1].set(1.0)
    return ladder._replace(temperature=t, rejection=rejection, count=ladder.count + 1)


def _bennett(energy: Array, temperature: Array) -> Array:
    """Estimate log Z of every rung by Bennett's acceptance ratio between neighbours: ``[K]``, or ``[K, D]``."""
    gap = _by_rung(jnp.diff(temperature), energy.ndim)
    forward, backward = -gap * energy[:-1], gap * energy[1:]
    ratio = log_mean_exp((0.5 * forward).swapaxes(0, 1)) - log_mean_exp((0.5 * backward).swapaxes(0, 1))
    for _ in range(BENNETT_ROUNDS):
        c = ratio[:, None]
        up = log_mean_exp(jax.nn.log_sigmoid(forward - c).swapaxes(0, 1))
        down = log_mean_exp(jax.nn.log_sigmoid(backward + c).swapaxes(0, 1))
        ratio = ratio + up - down
    return jnp.concatenate([jnp.zeros_like(ratio[:1]), jnp.cumsum(ratio, 0)])


def _quiet(weight: Array, rungs: Evaluated) -> Array | None:
    """Return weights with control variates, see :mod:`~numpyro_ebipla.smc.control`; None for too many coordinates."""
    flat = lambda a: a.reshape((*weight.shape, -1))
    x, slope = flat(rungs.position), flat(rungs.grad_base - rungs.grad_energy)
    fields = choose_fields(rungs.position.shape[1], [x.shape[-1:]])
    return reweighted(weight, x, slope, fields) if fields else None


def _weights(energy: Array, temperature: Array, log_z: Array) -> Array:
    r"""Return weights for the prior of the walkers of all rungs, ``[K P]`` or ``[K P, D]``.

    Together they are draws of the mixture ``(1/K) \sum_k p_0 e^{−t_k E} / Z_k``, wherever each stands (Shirts and
    Chodera, 2008, eq. 15).
    """
    log_mixture = jax.nn.logsumexp(jax.vmap(lambda t, z: -t * energy - z)(temperature, log_z), axis=0)
    log_weight = (-energy - log_mixture).reshape((-1, *energy.shape[2:]))
    return normalised(log_weight)
