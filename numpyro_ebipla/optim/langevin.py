"""The parameter move: any optax transformation or NumPyro optimiser, and what optax lacks.

The parameter noise of EBIPLA (2510.12311) and IPLA (2303.13429) is an optax transformation that takes its
key as an extra argument of ``update``, so that no hidden state decides a run:

>>> import jax.numpy as jnp, optax
>>> from jax import random
>>> optim = optax.chain(optax.sgd(1e-2), langevin_noise(1e-2))
>>> params = {"theta": jnp.zeros(3)}
>>> state = optim.init(params)
>>> updates, state = optim.update(params, state, params, rng_key=random.key(0), inverse_temperature=100)
>>> updates["theta"].shape
(3,)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, random
from jax.example_libraries import optimizers
from numpyro.optim import Minimize, _NumPyroOptim

from numpyro_ebipla._core.tree import normal_like
from numpyro_ebipla._core.validate import number
from numpyro_ebipla.kernels.mala import kinetic_move, kinetic_terms


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


def by_role(optims: dict[str, Any]) -> Callable[[tuple[str, ...]], optax.GradientTransformationExtraArgs]:
    """One optimiser for the energy's parameters and one for the rest, given the names of the former.

    Raises:
        ValueError: for other keys than ``"energy"`` and ``"rest"``.
        TypeError: as :func:`as_optax`.
    """
    if set(optims) != {"energy", "rest"}:
        raise ValueError(f'optim: a dictionary must have the keys "energy" and "rest", got {sorted(optims)}.')
    parts = {role: _default(role) if optim is default_optimizer else as_optax(optim) for role, optim in optims.items()}

    def chosen(energy_params: tuple[str, ...]) -> optax.GradientTransformationExtraArgs:
        label = lambda params: {name: "energy" if name in energy_params else "rest" for name in params}
        return optax.with_extra_args_support(optax.multi_transform(parts, label))

    return chosen


def as_optax(optim: Any) -> optax.GradientTransformationExtraArgs:
    """Any supported optimiser as an optax transformation with extra arguments.

    Raises:
        TypeError: if it is neither an optax transformation, a NumPyro optimiser (``Minimize`` excepted, which
            evaluates the loss by itself) nor one of ``jax.example_libraries.optimizers``.
    """
    if isinstance(optim, optax.GradientTransformation):
        return optax.with_extra_args_support(optim)
    if isinstance(optim, optimizers.Optimizer):
        optim = _NumPyroOptim(lambda *args: args, *optim)
    if not isinstance(optim, _NumPyroOptim) or isinstance(optim, Minimize):
        raise TypeError(
            "optim must be an optax.GradientTransformation, a numpyro.optim optimiser (not Minimize) or a "
            f"jax.example_libraries Optimizer, got {type(optim).__name__}; e.g. optim=optax.adam(1e-3)."
        )

    def update(updates: Any, state: Any, params: Any = None, *, value: Array, **extra: Any) -> tuple[Any, Any]:
        del extra
        state = optim.update(updates, state, value=value)
        moved = optim.get_params(state)
        return jax.tree.map(jnp.subtract, moved, params), state

    return optax.GradientTransformationExtraArgs(optim.init, update)


def check_optimiser(optim: optax.GradientTransformationExtraArgs, params: Any) -> None:
    """Try an optimiser out on shapes: some optax transformations need more than a gradient.

    Raises:
        TypeError: if it fails on the model's parameters.
    """

    def one_step(params: Any, rng_key: Array) -> Any:
        extra = {"value": jnp.zeros(()), "rng_key": rng_key, "inverse_temperature": 1, "num_data": 1}
        updates, _ = optim.update(params, optim.init(params), params, **extra)
        return optax.apply_updates(params, updates)

    try:
        jax.eval_shape(one_step, params, random.key(0))
    except Exception as e:  # whatever it raises
        raise TypeError(
            "optim does not work on the model's parameters: it must be a transformation of gradients, which line "
            f"searches (optax.lbfgs) and wrappers of parameters (optax.lookahead) are not; try optax.adam(1e-3). "
            f"It says: {e}"
        ) from e


class ReachState(NamedTuple):
    """Adam's first moment and second moments over long and over short; by parameter array how steady it moves."""

    count: Array  # type: ignore[assignment]
    mean: Any
    square: Any
    recent: Any
    log_reach: Any


def orthogonalised(matrix: Array) -> Array:
    """All singular values of ``[m, n]`` brought near one, by five Newton–Schulz iterations (Jordan et al., 2024)."""
    x = matrix / (jnp.linalg.norm(matrix) + 1e-30)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def reaching_adam(
    learning_rate: Callable[[Array], Array], gain: float = 0.1, orthogonal: bool = False
) -> optax.GradientTransformation:
    """Adam for parameters of any scale, however far they have to go.

    Three things differ from Adam (Kingma and Ba, 2015). Gradients at the start of a fit may be larger by orders of
    magnitude than later ones (variances that begin too small), and Adam's second moment remembers them for thousands
    of steps: here it is at most four times that of the last dozen. And the step of each parameter array has a factor
    of its own. It grows while the gradients keep their direction, up to the array's own root mean square, so that 1459
    is as near as 1 in the number of steps; and it falls while they point to and fro, as steps too large make them do.
    And with ``orthogonal``, for the weights of a network, the move of a matrix is its mean gradient with all singular
    values made equal (Muon; Jordan et al., 2024): directions in which gradients are small move as fast as the others.
    An energy learns fine detail so in a fraction of the steps.

    Args:
        learning_rate: schedule of the step size.
        gain: how fast the factors change.
        orthogonal: whether matrices move so.
    """
    b2, b3 = 0.999, 0.9
    # A constant in the energy has no gradient but rounding, 1e-7 in single precision, and must not drift by it.
    least = 1e-5 if orthogonal else 1e-8

    def init(params: Any) -> ReachState:
        wide = lambda p: jnp.promote_types(p.dtype, jnp.float32)  # squares of gradients leave the range of half floats
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, wide(p)), params)
        log_reach = jax.tree.map(lambda p: jnp.zeros((), wide(p)), params)
        return ReachState(jnp.zeros((), jnp.int32), zeros, zeros, zeros, log_reach)

    def update(updates: Any, state: ReachState, params: Any = None) -> tuple[Any, ReachState]:
        count = state.count + 1
        rate = learning_rate(state.count)

        def leaf(g: Array, m: Array, v: Array, f: Array, r: Array, p: Array) -> tuple[Array, ...]:
            # In double precision the scalars are doubles, but parameters (of modules) may still be single ones.
            rest = lambda b: (1 - b**count).astype(m.dtype)
            is_matrix = orthogonal and p.ndim == 2
            b1 = 0.95 if is_matrix else 0.9
            white = (1 - b1) / (1 + b1)  # squared mean over mean square, where gradients are white noise
            dtype, g, p = p.dtype, g.astype(m.dtype), p.astype(m.dtype)
            m, v, f = m + (1 - b1) * (g - m), v + (1 - b2) * (g**2 - v), f + (1 - b3) * (g**2 - f)
            mean, recent = m / rest(b1), f / rest(b3)
            steady = jnp.sum(mean**2) / (jnp.sum(recent) + 1e-30)
            size = jnp.sqrt(jnp.mean(p**2) * (p.shape[0] if is_matrix else 1))
            # In a network's gradients noise prevails: its steps do not fall or grow for noise alone.
            pivot = jnp.where(r > 0, 2 * white, white / 2) if orthogonal else white
            r = jnp.minimum(r + gain * (steady - pivot), jnp.log(jnp.maximum(size, 1.0)))
            if is_matrix:
                ahead = b1 * mean + (1 - b1) * g  # Nesterov's
                direction = max(1.0, p.shape[1] / p.shape[0]) ** 0.5 * orthogonalised(ahead)
            else:
                direction = mean / (jnp.sqrt(jnp.minimum(v / rest(b2), 4 * recent)) + least)
            step = -(rate * jnp.exp(r)).astype(g.dtype) * direction
            return step.astype(dtype), m, v, f, r

        out = jax.tree.map(leaf, updates, *state[1:], params)
        pick = lambda i: jax.tree.map(lambda o: o[i], out, is_leaf=lambda o: isinstance(o, tuple) and len(o) == 5)
        return pick(0), ReachState(count, *(pick(i) for i in range(1, 5)))

    return optax.GradientTransformation(init, update)


def default_optimizer(energy_params: tuple[str, ...] = ()) -> optax.GradientTransformationExtraArgs:
    """:func:`reaching_adam` at ``0.01/√(1 + k/1000)``, orthogonal for the energy's parameters.

    No horizon enters, so a run may be continued at any time; the tail average does the rest.

    Args:
        energy_params: names of the parameters on which an energy depends, but no base distribution.
    """
    return by_role({role: _default(role) for role in ("energy", "rest")})(energy_params)


def _default(role: str) -> optax.GradientTransformationExtraArgs:
    return reaching_adam(lambda k: 1e-2 / jnp.sqrt(1 + k / 1000), orthogonal=role == "energy")
