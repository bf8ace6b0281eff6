"""What all transition kernels share: a point, a target, what a move reports."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_ebipla._core.state import Adaptation, Latents
from numpyro_ebipla._core.validate import check_number

Target = Callable[[Latents], tuple[Array, Latents]]
Schedule = Callable[[Array], Array]


class Point(NamedTuple):
    """Chains together with what is known where they stand.

    Attributes:
        position: ``{site: [*C, *event]}``.
        log_density: ``[*C]``, or None if not yet known there.
        gradient: of the log density, like ``position``, or None.
        momentum: like ``position`` for underdamped kernels, else None.
    """

    position: Latents
    log_density: Array | None
    gradient: Latents | None
    momentum: Latents | None = None


class MoveInfo(NamedTuple):
    """What a move reports.

    Attributes:
        accept_prob: mean acceptance probability (one if unadjusted).
        by_datum: ``[B]`` the same by datum, where chains belong to data and the kernel adapts to them; else None.
        secant: ``{site: [*event]}`` change of the gradient over change of the position along the proposals,
            root mean squares over chains; None for kernels that do not use it.
        coupling: ``[D, D]`` see :func:`.coupled`; None where it is not learned.
    """

    accept_prob: Array
    secant: Latents | None = None
    by_datum: Array | None = None
    coupling: Array | None = None


def evaluated(target: Target, point: Point) -> Point:
    """``point`` with its log density and gradient filled in, if they are not there."""
    if point.gradient is not None:
        return point
    value, gradient = target(point.position)
    return point._replace(log_density=value, gradient=gradient)


def start(kernel: "Kernel", target: Target, position: Latents) -> tuple[Point, Adaptation]:
    """A point at ``position`` and a fresh adaptation, to use a kernel on its own."""
    value, gradient = target(position)
    chain_ndim = value.ndim
    momentum = jax.tree.map(jnp.zeros_like, position) if kernel.has_momentum else None
    return Point(position, value, gradient, momentum), kernel.init(position, chain_ndim)


class Kernel:
    """Base of the kernels: a fixed step size, nothing adapted."""

    adjusted = False
    has_momentum = False
    step_size: float | Schedule

    def __post_init__(self) -> None:
        check_number(self, "step_size")

    def init(self, position: Latents, chain_ndim: int) -> Adaptation:
        """Adaptation before the first move; ``chain_ndim`` is the number of chain axes."""
        first = self.step_size(jnp.zeros((), jnp.int32)) if callable(self.step_size) else self.step_size
        return Adaptation(jnp.log(jnp.asarray(first, dtype_of(position))), {}, jnp.zeros((), jnp.int32))

    def adapt(self, adapt: Adaptation, info: MoveInfo, point: Point) -> Adaptation:
        """Count the move and follow the schedule, if the step size is one."""
        count = adapt.count + 1
        if not callable(self.step_size):
            return adapt._replace(count=count)
        log_step = jnp.log(self.step_size(count)).astype(adapt.log_step.dtype)
        return adapt._replace(log_step=log_step, count=count)

    def move(self, rng_key: Array, target: Target, point: Point, adapt: Adaptation) -> tuple[Point, MoveInfo]:
        """One transition of every chain."""
        raise NotImplementedError


def dtype_of(position: Latents) -> jnp.dtype:
    """Return the type of the chains' numbers."""
    leaves = jax.tree.leaves(position)
    return jnp.result_type(*leaves) if leaves else jnp.result_type(float)
