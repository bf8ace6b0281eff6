"""Which optimiser: any of optax or NumPyro, one for each role, or the default."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, random
from jax.example_libraries import optimizers
from numpyro.optim import Minimize, _NumPyroOptim

from numpyro_ebipla.optim.default import default_for


def by_role(optims: dict[str, Any]) -> Callable[[tuple[str, ...]], optax.GradientTransformationExtraArgs]:
    """Return a function that makes one optimiser of two, given the names of the energy's parameters.

    Args:
        optims: ``{"energy": …, "rest": …}``, each anything that :func:`as_optax` takes, or
            :func:`default_optimizer` itself.

    Raises:
        ValueError: for other keys than ``"energy"`` and ``"rest"``.
        TypeError: as :func:`as_optax`.
    """
    if set(optims) != {"energy", "rest"}:
        raise ValueError(f'optim: a dictionary must have the keys "energy" and "rest", got {sorted(optims)}.')
    given = {role: as_optax(optim) for role, optim in optims.items() if optim is not default_optimizer}

    def chosen(energy_params: tuple[str, ...]) -> optax.GradientTransformationExtraArgs:
        parts = {role: given[role] if role in given else default_for(role, bool(energy_params)) for role in optims}
        label = lambda params: {name: "energy" if name in energy_params else "rest" for name in params}
        return optax.with_extra_args_support(optax.partition(parts, label))

    return chosen


def as_optax(optim: Any) -> optax.GradientTransformationExtraArgs:
    """Return any supported optimiser as an optax transformation with extra arguments.

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


def default_optimizer(energy_params: tuple[str, ...] = ()) -> optax.GradientTransformationExtraArgs:
    """Return the default: Adam with a reach at ``0.01/√(1 + k/1000)``, with orthogonal moves of networks' matrices.

    No horizon enters, so a run may be continued at any time; the tail average does the rest. See
    :func:`~numpyro_ebipla.optim.default.reaching_adam`. Networks are the energies', and other sites with at least two
    matrices: where there is an energy, the rate of these rises to the others' over the first thousand steps. Each
    number of a ``numpyro.param`` on which no energy depends has a reach of its own, elsewhere each array.

    Args:
        energy_params: names of the parameters on which an energy depends, but no base distribution.
    """
    return by_role({"energy": default_optimizer, "rest": default_optimizer})(energy_params)
