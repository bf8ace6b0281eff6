"""A base density and the energy that tilts it."""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array


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
        """The unnormalised tilted log density."""
        return self.log_base(x) - self.energy(x)
