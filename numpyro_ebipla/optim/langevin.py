"""Langevin moves of the parameters, for optax: their noise is a function of a key, not of a hidden state.

The kinetic move is that of :mod:`numpyro_ebipla.kernels`: in 2407.05790 particles and parameters follow one
underdamped diffusion with one integrator, so the chains' code moves the parameters, too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, random

from numpyro_ebipla._core.tree import normal_like
from numpyro_ebipla._core.validate import check_within
from numpyro_ebipla.kernels.langevin import kinetic_move, kinetic_terms


class NoiseState(NamedTuple):
    """Number of updates made, on which a schedule depends."""

    count: Array  # type: ignore[assignment]


def langevin_noise(
    step_size: float | Callable[[Array], Array], inverse_temperature: float | None = None, *, whole: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Add ``√(2h/(MN)) ξ`` to the update: the noise of ``θ`` in 2510.12311, eq. (8), and 2303.13429.

    Args:
        step_size: ``h``, or a schedule; that of the gradient step it is chained to.
        inverse_temperature: ``MN``. If None, the one that :class:`.EBIPLA` passes: number of
            data times number of particles.
        whole: the step it is chained to is ``h M``, see :func:`langevin`.

    Raises:
        ValueError: if the step size is not positive.
    """
    check_within("langevin_noise: step_size", step_size)

    def update(
        updates: Any, state: NoiseState, params: Any = None, *, rng_key: Array, **extra: Any
    ) -> tuple[Any, NoiseState]:
        del params
        h = _step_size(step_size, state, whole, extra)
        beta = extra["inverse_temperature"] if inverse_temperature is None else inverse_temperature
        noise = normal_like(rng_key, updates)
        updates = jax.tree.map(lambda u, xi: u + jnp.sqrt(2 * h / beta).astype(u.dtype) * xi, updates, noise)
        return updates, NoiseState(state.count + 1)

    return optax.GradientTransformationExtraArgs(_count_from_zero, update)


def langevin(
    step_size: float | Callable[[Array], Array], *, noise: bool = True, whole: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Return a gradient step on the contrast, with the noise of 2510.12311, eq. (8), if wanted.

    Args:
        step_size: ``h``, or a schedule.
        noise: add ``√(2h/(MN)) ξ``; without it, gradient descent.
        whole: the papers without energy priors (2204.12965, 2303.13429) descend the sum over the data, not its
            mean: the step becomes ``h M`` and the noise ``√(2h/N)``.

    Raises:
        ValueError: if the step size is not positive.
    """
    check_within("langevin: step_size", step_size)
    descent = _descent(step_size, whole)
    return optax.chain(descent, langevin_noise(step_size, whole=whole)) if noise else descent


def _descent(step_size: float | Callable[[Array], Array], whole: bool) -> optax.GradientTransformationExtraArgs:
    """Return the gradient step alone: ``−h`` times the gradient, or ``−h M``."""

    def update(updates: Any, state: NoiseState, params: Any = None, **extra: Any) -> tuple[Any, NoiseState]:
        del params
        h = _step_size(step_size, state, whole, extra)
        return jax.tree.map(lambda g: (-h * g).astype(g.dtype), updates), NoiseState(state.count + 1)

    return optax.GradientTransformationExtraArgs(_count_from_zero, update)


def _count_from_zero(params: Any) -> NoiseState:
    del params
    return NoiseState(jnp.zeros((), jnp.int32))


def _step_size(
    step_size: float | Callable[[Array], Array], state: NoiseState, whole: bool, extra: dict[str, Any]
) -> float | Array:
    """Return the step size of now; for the sum over the data, ``num_data`` of the extra arguments times as large."""
    h = step_size(state.count) if callable(step_size) else step_size
    return h * extra["num_data"] if whole else h


class KineticState(NamedTuple):
    """Velocity of the parameters."""

    velocity: Any


def kinetic_langevin(
    step_size: float, friction: float, *, noise: bool = True, whole: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Return underdamped Langevin moves of the parameters (KIPLMC1, 2407.05790, Alg. 1) by the exponential integrator.

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
    check_within("kinetic_langevin: step_size", step_size)
    check_within("kinetic_langevin: friction", friction)
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
