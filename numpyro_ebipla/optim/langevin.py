"""Langevin moves of the parameters, for optax: their noise is a function of a key, not of a hidden state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, random

from numpyro_ebipla._core.tree import normal_like
from numpyro_ebipla._core.validate import number
from numpyro_ebipla.kernels.langevin import kinetic_move, kinetic_terms


class NoiseState(NamedTuple):
    """Number of updates made."""

    count: Array  # type: ignore[assignment]


def _counting(params: Any) -> NoiseState:
    del params
    return NoiseState(jnp.zeros((), jnp.int32))


def langevin_noise(
    step_size: float | Callable[[Array], Array], inverse_temperature: float | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Add ``√(2h/(MN)) ξ`` to the update: the noise of ``θ`` in 2510.12311, eq. (8), and 2303.13429.

    Args:
        step_size: ``h``, or a schedule; that of the gradient step it is chained to.
        inverse_temperature: ``MN``. If None, the one that :class:`~numpyro_ebipla.EBIPLA` passes: number of
            data times number of particles.

    Raises:
        ValueError: if the step size is not positive.
    """
    number("langevin_noise: step_size", step_size)

    def update(
        updates: Any, state: NoiseState, params: Any = None, *, rng_key: Array, **extra: Any
    ) -> tuple[Any, NoiseState]:
        del params
        h = step_size(state.count) if callable(step_size) else step_size
        beta = extra["inverse_temperature"] if inverse_temperature is None else inverse_temperature
        noise = normal_like(rng_key, updates)
        updates = jax.tree.map(lambda u, xi: u + jnp.sqrt(2 * h / beta).astype(u.dtype) * xi, updates, noise)
        return updates, NoiseState(state.count + 1)

    return optax.GradientTransformationExtraArgs(_counting, update)


def langevin(
    step_size: float | Callable[[Array], Array], *, noise: bool = True, whole: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""A gradient step on the contrast, with the noise of 2510.12311, eq. (8), if wanted.

    Args:
        step_size: ``h``, or a schedule.
        noise: add ``√(2h/(MN)) ξ``; without it, gradient descent.
        whole: the papers without energy priors (2204.12965, 2303.13429) descend the sum over the data, not its
            mean: the step becomes ``h M`` and the noise ``√(2h/N)``.

    Raises:
        ValueError: if the step size is not positive.
    """
    number("langevin: step_size", step_size)

    def update(
        updates: Any,
        state: NoiseState,
        params: Any = None,
        *,
        rng_key: Array,
        num_data: int,
        inverse_temperature: float,
        **extra: Any,
    ) -> tuple[Any, NoiseState]:
        del params, extra
        h = (step_size(state.count) if callable(step_size) else step_size) * (num_data if whole else 1)
        scale = jnp.sqrt(2 * h / inverse_temperature) if noise else 0.0
        xi = normal_like(rng_key, updates)
        return jax.tree.map(lambda g, x: (-h * g + scale * x).astype(g.dtype), updates, xi), NoiseState(state.count + 1)

    return optax.GradientTransformationExtraArgs(_counting, update)


class KineticState(NamedTuple):
    """Velocity of the parameters."""

    velocity: Any


def kinetic_langevin(
    step_size: float, friction: float, *, noise: bool = True, whole: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Underdamped Langevin parameters (KIPLMC1, 2407.05790, Alg. 1) by the exponential integrator.

    ``dθ = V dt, dV = −γ V dt − ∇U dt + √(2γ/β) dB`` with ``U`` the contrast and ``β = MN``, or, with ``whole``,
    its sum over the data and ``β = N``.

    Args:
        step_size: ``h``.
        friction: ``γ > 0``.
        noise: without it, momentum descent (2407.05790's deterministic limit).
        whole: see :func:`langevin`.

    Raises:
        ValueError: if step size or friction is not positive.
    """
    number("kinetic_langevin: step_size", step_size)
    number("kinetic_langevin: friction", friction)
    h, gamma = step_size, friction

    def init(params: Any) -> KineticState:
        return KineticState(jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: Any,
        state: KineticState,
        params: Any = None,
        *,
        rng_key: Array,
        num_data: int,
        inverse_temperature: float,
        **extra: Any,
    ) -> tuple[Any, KineticState]:
        del params, extra
        size = num_data if whole else 1
        terms = kinetic_terms(h, gamma)
        scale = jnp.sqrt(size / inverse_temperature) if noise else 0.0
        key_v, key_x = random.split(rng_key)
        noises = normal_like(key_v, updates), normal_like(key_x, updates)
        drift = jax.tree.map(lambda g: -size * g, updates)
        a, b = jax.tree.map(lambda x: scale * x, noises)
        moved = jax.tree.map(lambda v, g, a, b: kinetic_move(terms, v, g, a, b), state.velocity, drift, a, b)
        pick = lambda i: jax.tree.map(lambda v, m: m[i].astype(v.dtype), state.velocity, moved)
        return pick(0), KineticState(pick(1))

    return optax.GradientTransformationExtraArgs(init, update)
