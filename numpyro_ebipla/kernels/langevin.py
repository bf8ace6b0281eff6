"""Unadjusted Langevin kernels, overdamped and underdamped."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, random

from numpyro_ebipla._core.state import Adaptation
from numpyro_ebipla._core.tree import normal_like
from numpyro_ebipla._core.validate import check_number
from numpyro_ebipla.kernels.base import Kernel, MoveInfo, Point, Schedule, Target, evaluated


@dataclass(frozen=True)
class ULA(Kernel):
    """Unadjusted Langevin: the Euler–Maruyama step of EBIPLA (2510.12311) and IPLA (2303.13429).

    For a standard normal target its stationary variance is ``1 / (1 − h/2)``.

    Args:
        step_size: ``h``, a number or a schedule of the number of moves made (any optax schedule).
    """

    step_size: float | Schedule = 1e-2

    def move(self, rng_key: Array, target: Target, point: Point, adapt: Adaptation) -> tuple[Point, MoveInfo]:
        """As :meth:`Kernel.move`."""
        point = evaluated(target, point)
        h = jnp.exp(adapt.log_step)
        noise = normal_like(rng_key, point.position)
        position = jax.tree.map(
            lambda x, g, xi: x + h * g + jnp.sqrt(2 * h) * xi, point.position, point.gradient, noise
        )
        return Point(position, None, None), MoveInfo(jnp.ones_like(h))


@dataclass(frozen=True)
class Underdamped(Kernel):
    """Underdamped (kinetic) Langevin, unadjusted: the exponential integrator of Cheng et al. (2018).

    With the gradient frozen over a step the remaining Ornstein–Uhlenbeck process is solved exactly,
    position and velocity noise with their joint covariance. KIPLMC (2407.05790) uses the same scheme.

    Args:
        step_size: ``h``, a number or a schedule; of the order of the target's standard deviations.
        friction: ``γ > 0``.
    """

    step_size: float | Schedule = 0.1
    friction: float = 2.0
    has_momentum = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "friction")

    def move(self, rng_key: Array, target: Target, point: Point, adapt: Adaptation) -> tuple[Point, MoveInfo]:
        """As :meth:`Kernel.move`."""
        point = evaluated(target, point)
        terms = kinetic_terms(jnp.exp(adapt.log_step), self.friction)
        key_v, key_x = random.split(rng_key)
        noise = normal_like(key_v, point.position), normal_like(key_x, point.position)
        moved = {
            name: kinetic_move(terms, point.momentum[name], point.gradient[name], noise[0][name], noise[1][name])
            for name in point.position
        }
        position = {name: x + moved[name][0] for name, x in point.position.items()}
        momentum = {name: velocity for name, (_, velocity) in moved.items()}
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
    """The integrals of the Ornstein–Uhlenbeck process over a step (Cheng et al., 2018, Lemma 11), unit temperature."""
    decay = jnp.exp(-gamma * h)
    drift = -jnp.expm1(-gamma * h) / gamma  # ∫₀ʰ e^{−γt} dt
    var_v = -jnp.expm1(-2 * gamma * h)
    var_x = (2 * h - 4 * drift - jnp.expm1(-2 * gamma * h) / gamma) / gamma
    cov = gamma * drift**2
    rest = jnp.sqrt(jnp.maximum(var_x - cov**2 / var_v, 0.0))
    return KineticTerms(decay, drift, (h - drift) / gamma, jnp.sqrt(var_v), cov / jnp.sqrt(var_v), rest)


def kinetic_move(terms: KineticTerms, velocity: Any, gradient: Any, noise: Any, other: Any) -> tuple[Any, Any]:
    """Displacement and new velocity, the gradient (of the log density) frozen over the step."""
    moved = terms.drift * velocity + terms.drift_x * gradient + terms.noise_x_from_v * noise + terms.noise_x * other
    return moved, terms.decay * velocity + terms.drift * gradient + terms.noise_v * noise
