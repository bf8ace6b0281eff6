"""A base density and the energy that tilts it; walkers where both are known, and a move of them."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from numpyro_ebipla._core.tree import batched_value_and_grad, chain_select
from numpyro_ebipla.kernels.metropolis import Here, Shape, metropolis
from numpyro_ebipla.smc.weights import normalised

#: Acceptance that step sizes are driven to: a little above MALA's optimum in high dimension, 0.574 (Roberts and
#: Rosenthal, 1998), as walkers at low temperatures may have few dimensions that matter.
TARGET_ACCEPT = 0.65
#: Least variance of a population, for coordinates that are constant in it.
LEAST_VARIANCE = 1e-12


class TiltedDensity(NamedTuple):
    """A base density and the energy that tilts it, as functions of unconstrained positions.

    Attributes:
        log_base: ``[P, *event] -> [P]`` (or ``[P, D, *event] -> [P, D]``), normalised.
        energy: the same shapes.
        sample_base: ``(rng_key, P) -> [P, *event]`` exact draws of the base.
    """

    log_base: Callable[[Array], Array]
    energy: Callable[[Array], Array]
    sample_base: Callable[[Array, int], Array]

    def log_density(self, x: Array) -> Array:
        """Return the unnormalised tilted log density."""
        return self.log_base(x) - self.energy(x)

    def evaluate(self, x: Array) -> "Evaluated":
        """Return all that is known at ``x``: two backward passes."""
        log_base, grad_base = batched_value_and_grad(self.log_base)(x)
        energy, grad_energy = batched_value_and_grad(self.energy)(x)
        return Evaluated(x, log_base, energy, grad_base, grad_energy)


class Evaluated(NamedTuple):
    """Walkers, and what is known where they stand.

    Attributes:
        position: ``[*C, *event]``.
        log_base: ``[*C]`` log density of the base.
        energy: ``[*C]``.
        grad_base: gradient of ``log_base``, like ``position``.
        grad_energy: gradient of ``energy``, like ``position``.
    """

    position: Array
    log_base: Array
    energy: Array
    grad_base: Array
    grad_energy: Array

    def tempered(self, temperature: Array) -> tuple[Array, Array]:
        """Return the log density ``log p_0 − t E`` and its gradient; ``t`` is a scalar, or ``[K]`` by leading axis."""
        along = lambda a: jnp.reshape(temperature, jnp.shape(temperature) + (1,) * (a.ndim - jnp.ndim(temperature)))
        energy, gradient = self.energy, self.grad_energy
        return self.log_base - along(energy) * energy, self.grad_base - along(gradient) * gradient


def move_tempered(
    rng_key: Array,
    evaluate: Callable[[Array], Evaluated],
    here: Evaluated,
    temperature: Array,
    step_size: Array,
    variance: Array,
) -> tuple[Evaluated, Array]:
    """Move walkers once by MALA towards ``log p_0 − t E``.

    Args:
        rng_key: a PRNG key.
        evaluate: such as :meth:`TiltedDensity.evaluate`.
        here: the walkers.
        temperature: see :meth:`Evaluated.tempered`.
        step_size: ``h``, in units of ``variance``.
        variance: of the proposals, broadcasting to the positions.

    Returns:
        The walkers and their acceptance probabilities ``[*C]``.
    """

    def target(x: Array) -> tuple[Array, Array, Evaluated]:
        there = evaluate(x)
        return *there.tempered(temperature), there

    start = Here(here.position, *here.tempered(temperature))
    accept, new, prob = metropolis(rng_key, target, start, step_size, Shape(variance))
    return chain_select(accept, new.extra, here), prob


def population_variance(x: Array, log_weight: Array) -> Array:
    """Return the weighted variance of a population, per coordinate (and per D), kept away from zero."""
    weight = normalised(log_weight)
    weight = weight.reshape(weight.shape + (1,) * (x.ndim - weight.ndim))
    centred = x - jnp.sum(weight * x, 0, keepdims=True)
    return jnp.maximum(jnp.sum(weight * jnp.square(centred), 0), LEAST_VARIANCE)
