"""Unadjusted Langevin kernels, overdamped and underdamped."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, final

import jax
import jax.numpy as jnp
from jax import Array, random

from numpyro_ebipla._core.state import Adaptation
from numpyro_ebipla._core.tree import PyTree, normal_like
from numpyro_ebipla._core.validate import check_number
from numpyro_ebipla.kernels.base import (
    AbstractKernel,
    MoveInfo,
    Point,
    Schedule,
    Target,
    evaluate,
    first_adaptation,
)


class AbstractUnadjusted(AbstractKernel):
    """A kernel whose step size is given, as a number or by a schedule, and which learns nothing."""

    adjusted: ClassVar[bool] = False

    def init(self, position: PyTree, chain_ndim: int) -> Adaptation:
        """Return the first step size."""
        return first_adaptation(self.step_size, position)

    def adapt(self, adapt: Adaptation, info: MoveInfo, point: Point) -> Adaptation:
        """Count the move and follow the schedule, if the step size is one."""
        count = adapt.count + 1
        if not callable(self.step_size):
            return adapt._replace(count=count)
        log_step = jnp.log(self.step_size(count)).astype(adapt.log_step.dtype)
        return adapt._replace(log_step=log_step, count=count)


@final
@dataclass(frozen=True)
class ULA(AbstractUnadjusted):
    """Unadjusted Langevin: the Euler–Maruyama step of EBIPLA (2510.12311) and IPLA (2303.13429).

    For a standard normal target its stationary variance is ``1 / (1 − h/2)``.

    Args:
        step_size: ``h``, a number or a schedule of the number of moves made (any optax schedule).
    """

    step_size: float | Schedule = 1e-2
    has_momentum: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number(self, "step_size")

    def move(self, rng_key: Array, target: Target, point: Point, adapt: Adaptation) -> tuple[Point, MoveInfo]:
        """Make one Euler–Maruyama step of every chain."""
        point = evaluate(target, point)
        h = jnp.exp(adapt.log_step)
        noise = normal_like(rng_key, point.position)
        position = jax.tree.map(
            lambda x, g, xi: x + h * g + jnp.sqrt(2 * h) * xi, point.position, point.gradient, noise
        )
        return Point(position, None, None), MoveInfo(jnp.ones_like(h))


@final
@dataclass(frozen=True)
class Underdamped(AbstractUnadjusted):
    """Underdamped (kinetic) Langevin, unadjusted: the exponential integrator of Cheng et al. (2018).

    With the gradient frozen over a step the remaining Ornstein–Uhlenbeck process is solved exactly,
    position and velocity noise with their joint covariance. KIPLMC (2407.05790) uses the same scheme.

    Args:
        step_size: ``h``, a number or a schedule; of the order of the target's standard deviations.
        friction: ``γ > 0``.
    """

    step_size: float | Schedule = 0.1
    friction: float = 2.0
    has_momentum: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number(self, "step_size")
        check_number(self, "friction")

    def move(self, rng_key: Array, target: Target, point: Point, adapt: Adaptation) -> tuple[Point, MoveInfo]:
        """Integrate position and momentum of every chain over one step."""
        point = evaluate(target, point)
        step = partial(kinetic_move, kinetic_terms(jnp.exp(adapt.log_step), self.friction))
        key_v, key_x = random.split(rng_key)
        noise = normal_like(key_v, point.position), normal_like(key_x, point.position)
        pairs = jax.tree.map(step, point.momentum, point.gradient, *noise)
        moved, momentum = jax.tree.transpose(jax.tree.structure(point.position), jax.tree.structure((0, 0)), pairs)
        position = jax.tree.map(jnp.add, point.position, moved)
        return Point(position, None, None, momentum), MoveInfo(jnp.ones_like(adapt.log_step))


class KineticTerms(NamedTuple):
    """Coefficients of :func:`kinetic_move` for a step size and a friction."""

    decay: Array
    drift: Array
    drift_x: Array
    noise_v: Array
    noise_x_from_v: Array
    noise_x: Array


def kinetic_terms(h: Array | float, gamma: float) -> KineticTerms:
    """Integrate the Ornstein–Uhlenbeck process of unit temperature over a step (Cheng et al., 2018, Lemma 11)."""
    decay = jnp.exp(-gamma * h)
    drift = -jnp.expm1(-gamma * h) / gamma  # ∫₀ʰ e^{−γt} dt
    var_v = -jnp.expm1(-2 * gamma * h)
    var_x = (2 * h - 4 * drift - jnp.expm1(-2 * gamma * h) / gamma) / gamma
    cov = gamma * drift**2
    rest = jnp.sqrt(jnp.maximum(var_x - cov**2 / var_v, 0.0))
    return KineticTerms(decay, drift, (h - drift) / gamma, jnp.sqrt(var_v), cov / jnp.sqrt(var_v), rest)


def kinetic_move(terms: KineticTerms, velocity: Any, gradient: Any, noise: Any, other: Any) -> tuple[Any, Any]:
    """Return the displacement and the new velocity, the gradient (of the log density) frozen over the step."""
    moved = terms.drift * velocity + terms.drift_x * gradient + terms.noise_x_from_v * noise + terms.noise_x * other
    return moved, terms.decay * velocity + terms.drift * gradient + terms.noise_v * noise
