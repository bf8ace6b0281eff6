r"""Langevin transition kernels over many independent chains.

Each kernel moves a :class:`Point`, chains in the leading axes ``C``, towards a log density ``log π``.
``h`` is the step size and ``s`` a per-coordinate scale (one where nothing is preconditioned):

====================  ===========================================================================  ====
kernel                proposal                                                                     bias
====================  ===========================================================================  ====
:class:`ULA`          ``x + h ∇log π(x) + √(2h) ξ``                                                O(h)
:class:`MALA`         ``x + h s² ∇log π(x) + √(2h) s ξ``, accepted or rejected per chain           none
:class:`Underdamped`  exponential integrator of ``dx = v dt, dv = ∇log π dt − γ v dt + √(2γ) dB``  O(h)
====================  ===========================================================================  ====

A kernel uses the gradient that the point already carries. ULA and Underdamped therefore cost no
gradient of their own after a training step's backward pass, MALA exactly one, at its proposal.

A chain in plain JAX:

>>> import jax, jax.numpy as jnp
>>> from numpyro_ebipla.kernels.mala import MALA, start
>>> from numpyro_ebipla._core.tree import batched_value_and_grad
>>> target = batched_value_and_grad(lambda x: -0.5 * jnp.sum(x["x"] ** 2, -1))
>>> kernel = MALA()
>>> point, adapt = start(kernel, target, {"x": jnp.zeros((1000, 2))})
>>> for key in jax.random.split(jax.random.key(0), 50):
...     point, info = kernel.move(key, target, point, adapt)
...     adapt = kernel.adapt(adapt, info, point)
>>> bool(jnp.abs(point.position["x"].var() - 1) < 0.1)
True
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, random

from numpyro_ebipla._core.state import Adaptation, DatumSteps, Latents
from numpyro_ebipla._core.tree import chain_select, normal_like
from numpyro_ebipla._core.validate import check_number
from numpyro_ebipla.kernels.metropolis import Proposal, Shape, coupled, inverse, learned, metropolis

#: Coordinates of a chain up to which their coupling is learned, where chains belong to data and where they are few:
#: beyond, its matrices would cost more than they save.
MAX_COUPLED, MAX_COUPLED_FEW = 32, 128

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
        return Adaptation(jnp.log(jnp.asarray(first, _dtype(position))), {}, jnp.zeros((), jnp.int32))

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
class MALA(Kernel):
    """Metropolis-adjusted Langevin, accepted per chain, with its step size and scales adapted.

    The step size follows ``log h += ρ_k (acceptance − target_accept)``; the scale of each coordinate is
    the inverse square root of its mean squared gradient over chains and time, which is the diagonal of
    the Fisher information of the target (Titsias, 2023, *Optimal preconditioning and Fisher adaptive
    Langevin sampling*). Chains that start many standard deviations out have gradients that say how far they
    are, not how curved the target is, and scales from these would hold them there; there the change of the
    gradient along the proposals is the smaller of the two and is taken instead. Scales are shared by all chains of
    the family, and so is the step, but where chains belong to data, with a factor of its own for each datum: some
    posteriors are much narrower than others. The coordinates of a chain, of all its sites, are decorrelated as well, if
    they are at most 32 (128 where chains do not belong to data), by the mean curvature along the proposals: see
    :func:`.coupled`.

    Args:
        step_size: the first ``h`` (in units of the scales, so of order one whatever the data).
        target_accept: acceptance that the step size is driven to.
        precondition: whether the scales are adapted; ones if not.
        adapt_step: whether the step size is adapted.
    """

    step_size: float = 0.2
    target_accept: float = 0.65
    precondition: bool = True
    adapt_step: bool = True
    adjusted = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "target_accept", below=1.0)

    def init(self, position: Latents, chain_ndim: int) -> Adaptation:
        """As :meth:`Kernel.init`."""
        adapt = super().init(position, chain_ndim)
        if self.adapt_step and chain_ndim == 2 and position:
            num_data = jax.tree.leaves(position)[0].shape[1]
            steps = DatumSteps(jnp.zeros(num_data, adapt.log_step.dtype), jnp.zeros(num_data, jnp.int32))
            adapt = adapt._replace(by_datum=steps)
        if not self.precondition:
            return adapt
        ones = {k: jnp.ones(x.shape[chain_ndim:], x.dtype) for k, x in position.items()}
        size = sum(x.size for x in ones.values())
        limit = MAX_COUPLED if chain_ndim == 2 else MAX_COUPLED_FEW
        wide = jnp.promote_types(_dtype(position), jnp.float32)  # there is no factorisation of half floats
        factor = jnp.eye(size, dtype=wide) if 1 < size <= limit else None
        return adapt._replace(curvature=ones, coupling=factor)

    def adapt(self, adapt: Adaptation, info: MoveInfo, point: Point) -> Adaptation:
        """As :meth:`Kernel.adapt`."""
        k = adapt.count.astype(adapt.log_step.dtype)
        log_step, curvature, by_datum, coupling = adapt.log_step, adapt.curvature, adapt.by_datum, adapt.coupling
        if self.adapt_step:
            rate = jnp.maximum(0.5 / (1 + k) ** 0.5, 0.02)
            log_step = log_step + rate * (info.accept_prob - self.target_accept)
        if self.precondition:
            rate = jnp.maximum(1 / (1 + k), 0.01)
            curvature = jax.tree.map(
                lambda c, g, s: _running_mean(c, g, s, rate), curvature, point.gradient, info.secant
            )
        if coupling is not None:
            coupling = learned(coupling, info.coupling, jnp.maximum(1 / (10 + k), 0.01))
        if by_datum is not None:
            rate = 0.5 / (1 + by_datum.count) ** 0.5  # it vanishes: few chains adapt it to themselves
            steps = by_datum.log_step + rate * (info.by_datum - info.accept_prob)
            by_datum = DatumSteps(steps.astype(log_step.dtype), by_datum.count + 1)
        return Adaptation(log_step, curvature, adapt.count + 1, by_datum, coupling)

    def move(self, rng_key: Array, target: Target, point: Point, adapt: Adaptation) -> tuple[Point, MoveInfo]:
        """As :meth:`Kernel.move`."""
        point = evaluated(target, point)
        shape = proposal_shape(adapt, point.position)
        accept, new, prob = metropolis(rng_key, lambda x: (*target(x), ()), point[:3], jnp.exp(adapt.log_step), shape)
        secant = _secants(point.gradient, new, shape, adapt.curvature) if adapt.curvature else None
        coupling = None if adapt.coupling is None else coupled(new, adapt.coupling)
        by_datum = None if adapt.by_datum is None else prob.mean(0)
        return Point(*chain_select(accept, new[:3], point[:3])), MoveInfo(prob.mean(), secant, by_datum, coupling)


def proposal_shape(adapt: Adaptation, position: Latents) -> Shape:
    """Of the proposals, relative to the shared step size; the variance broadcasts to ``{site: [*C, *event]}``."""
    variance = {name: 1 / c for name, c in adapt.curvature.items()}
    variance = variance or {name: jnp.ones((), x.dtype) for name, x in position.items()}
    if adapt.by_datum is not None:
        factor = jnp.exp(adapt.by_datum.log_step)
        own = {name: factor.reshape((-1,) + (1,) * (x.ndim - 2)) for name, x in position.items()}
        variance = {name: own[name] * variance[name] for name in position}
    return Shape(variance, None if adapt.coupling is None else inverse(adapt.coupling))


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


def _secants(gradient: Latents, proposal: Proposal, shape: Shape, like: Latents) -> Latents:
    """Root mean square change of the gradient over the step by scale along it; ``like`` has the events' shapes."""

    def secant(v: Array, w: Array, g: Array, new: Array, like: Array) -> Array:
        axes = tuple(range(g.ndim - like.ndim))
        moved, turned = v * jnp.square(w), jnp.square(new - g)
        known = jnp.isfinite(turned) & jnp.isfinite(moved)
        moved, turned = (jnp.sum(jnp.where(known, a, 0.0), axis=axes) for a in (moved, turned))
        return jnp.sqrt(turned / moved)

    return jax.tree.map(secant, shape.variance, proposal.moved, gradient, proposal.gradient, like)


def _running_mean(curvature: Array, gradient: Array, secant: Array, rate: Array) -> Array:
    """Move ``curvature`` towards the mean squared gradient, or the secant where that is less.

    At stationarity the mean squared gradient is the mean second derivative, and the secant about its root mean
    square, which is larger. What is not finite or zero is left out.
    """
    axes = tuple(range(gradient.ndim - curvature.ndim))
    square = jnp.mean(jnp.square(gradient), axis=axes)
    square = jnp.where((secant > 0) & ~(square < secant), secant, square)
    square = jnp.where(jnp.isfinite(square) & (square > 0), square, curvature)
    return curvature + rate * (square - curvature)


def _dtype(position: Latents) -> jnp.dtype:
    leaves = jax.tree.leaves(position)
    return jnp.result_type(*leaves) if leaves else jnp.result_type(float)
