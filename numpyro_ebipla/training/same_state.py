"""States of another model, plate, precision or configuration, refused by name before any long work."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebipla._core.errors import ModelError, x64_hint
from numpyro_ebipla._core.state import TrainState
from numpyro_ebipla._core.tree import by_path
from numpyro_ebipla.training.config import Config


def check_is_state(state: Any, argument: str = "state") -> None:
    """Raise unless ``state`` is a TrainState (passing a Fit is the usual slip).

    Raises:
        TypeError: naming the argument.
    """
    if not isinstance(state, TrainState):
        raise TypeError(f"{argument} must be the state of a fit (fit.state), got {type(state).__name__}.")


def check_state(config: Config, fresh: TrainState, state: Any, argument: str) -> None:
    """Raise for a state of another model, plate size, precision or configuration than ``fresh``, which may be shapes.

    Raises:
        TypeError, ModelError
    """
    check_is_state(state, argument)
    if _same_shapes(_without_key(state), _without_key(fresh)):  # a loop over update asks each time
        return
    model = config.model
    for name, value in state.posterior.local.items():
        if name in model.latents and value.shape[1] != model.num_data:
            plate = model.plate.name if model.plate else ""
            raise ModelError(
                f"{argument} holds particles of {value.shape[1]} data at '{name}', but the plate '{plate}' now has "
                f"{model.num_data}: a state belongs to its data; start afresh with init_params=fit.params."
            )

    sites = {*state.posterior.local, *state.posterior.shared}
    if sites != {*model.latents} or {*state.prior} != {*model.energies}:
        raise ModelError(
            f"{argument} has latents {sorted(sites)} and energy priors {sorted(state.prior)}, the model has "
            f"{sorted(model.latents)} and {sorted(model.energies)}."
        )
    number = {v.shape[0] for v in jax.tree.leaves(state.posterior.latents)}
    if number - {config.num_particles}:
        raise ModelError(
            f"{argument} has {' and '.join(map(str, sorted(number)))} particles, this EBIPLA {config.num_particles}: "
            f"pass num_particles={min(number)}."
        )
    chains = lambda posterior: (posterior.momentum, posterior.adapt_local, posterior.adapt_shared, posterior.memory)
    parts: list[tuple[str, Callable[[TrainState], Any]]] = [
        ("parameters", lambda state: state.params),
        ("optimiser (optim=)", lambda state: state.optim_state),
        ("latents", lambda state: state.posterior.latents),
        ("particles (kernel= or posterior=)", lambda state: chains(state.posterior)),
        *((f"walkers at '{name}' (prior=)", lambda state, name=name: state.prior[name]) for name in state.prior),
        ("mutable values", lambda state: state.mutable),
    ]
    for what, part in parts:
        found, wanted = _described(part(state)), _described(part(fresh))
        key = next((k for k in [*found, *wanted] if found.get(k) != wanted.get(k)), None)
        if key is None:
            continue
        a, b = found.get(key, ("none", None)), wanted.get(key, ("none", None))
        said = f"shape {a[0]} against {b[0]}" if a[0] != b[0] else f"type {a[1]} against {b[1]}"
        instead = x64_hint(a[1], b[1]) if a[0] == b[0] else ""
        raise ModelError(
            f"{argument} has other {what} than this EBIPLA and model: '{key}' of {said}; "
            f"{instead or 'give the arguments that it was made with'}, or start afresh with init_params=fit.params."
        )


def _without_key(state: TrainState) -> dict[str, Any]:
    """Return all of a state but its key, of which there are kinds."""
    return {name: part for name, part in state._asdict().items() if name != "rng_key"}


def _described(tree: Any) -> dict[str, tuple[Any, Any]]:
    """Return shape and type of every leaf."""
    return {path: _shape_and_type(leaf) for path, leaf in by_path(tree).items()}


def _shape_and_type(x: Any) -> tuple[Any, Any]:
    if isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        return x.shape, x.dtype
    return np.shape(x), jnp.result_type(x)  # NumPy's double precision becomes single where JAX has no other


def _same_shapes(tree: Any, other: Any) -> bool:
    (leaves, structure), (others, its_structure) = jax.tree.flatten(tree), jax.tree.flatten(other)
    same: Any = structure == its_structure  # type: ignore[operator]
    return same and all(_shape_and_type(x) == _shape_and_type(y) for x, y in zip(leaves, others, strict=True))
