"""Arguments and states refused by name, before any long work."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random

from numpyro_ebipla._errors import ModelError, x64_hint
from numpyro_ebipla._options import count
from numpyro_ebipla._static import constants_are_traced, is_array, is_traced
from numpyro_ebipla._types import TrainState
from numpyro_ebipla.kernels import MALA, Kernel
from numpyro_ebipla.model import LatentModel
from numpyro_ebipla.particles import Particles
from numpyro_ebipla.step import Config


def check_key(rng_key: Any) -> Array:
    """A typed key from a typed or a raw one."""
    if is_array(rng_key):
        if jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key) and rng_key.shape == ():
            return rng_key
        if rng_key.dtype == jnp.uint32 and rng_key.shape == (2,):
            return random.wrap_key_data(jnp.asarray(rng_key))
    raise TypeError(f"rng_key must be a PRNG key such as jax.random.key(0), got {rng_key!r}.")


def check_untraced(method: str, *values: Any) -> None:
    """Refuse to run where there are no numbers to look at.

    Raises:
        ModelError: naming the method.
    """
    if constants_are_traced() or is_traced(values):
        raise ModelError(
            f"{method} looks at its numbers as it goes, and there are none inside jit, vmap or grad: call it outside. "
            "update, evaluate, log_likelihood, anomaly_score and reconstruct may be called inside."
        )


def check_state(config: Config, fresh: TrainState, state: Any) -> None:
    """Refuse a state of another model, plate size, precision or configuration than ``fresh``, which may be shapes only.

    Raises:
        TypeError, ModelError
    """
    if not isinstance(state, TrainState):
        raise TypeError(f"init_state must be the state of a fit (fit.state), got {type(state).__name__}.")
    model = config.model
    for name, value in state.posterior.local.items():
        if name in model.latents and value.shape[1] != model.num_data:
            plate = model.plate.name if model.plate else ""
            raise ModelError(
                f"init_state holds particles of {value.shape[1]} data at '{name}', but the plate '{plate}' now has "
                f"{model.num_data}: a state belongs to its data; start afresh with init_params=fit.params."
            )

    sites = {*state.posterior.local, *state.posterior.glob}
    if sites != {*model.latents} or {*state.prior} != {*model.energies}:
        raise ModelError(
            f"init_state has latents {sorted(sites)} and energy priors {sorted(state.prior)}, the model has "
            f"{sorted(model.latents)} and {sorted(model.energies)}."
        )
    number = {v.shape[0] for v in jax.tree.leaves((state.posterior.local, state.posterior.glob))}
    if number - {config.num_particles}:
        raise ModelError(
            f"init_state has {number} particles, this EBIPLA {config.num_particles}: pass num_particles={min(number)}."
        )
    chains = lambda posterior: (posterior.momentum, posterior.adapt_local, posterior.adapt_global, posterior.memory)
    parts: list[tuple[str, Callable[[TrainState], Any]]] = [
        ("parameters", lambda state: state.params),
        ("optimiser (optim=)", lambda state: state.optim_state),
        ("latents", lambda state: (state.posterior.local, state.posterior.glob)),
        ("particles (kernel= or posterior=)", lambda state: chains(state.posterior)),
        *((f"walkers at '{name}' (prior=)", lambda state, name=name: state.prior[name]) for name in state.prior),
        ("mutable values", lambda state: state.mutable),
    ]
    for what, part in parts:
        theirs, ours = _described(part(state)), _described(part(fresh))
        key = next((k for k in [*theirs, *ours] if theirs.get(k) != ours.get(k)), None)
        if key is None:
            continue
        a, b = theirs.get(key, ("none", None)), ours.get(key, ("none", None))
        said = f"shape {a[0]} against {b[0]}" if a[0] != b[0] else f"type {a[1]} against {b[1]}"
        instead = x64_hint(a[1], b[1]) if a[0] == b[0] else ""
        raise ModelError(
            f"init_state has other {what} than this EBIPLA and model: '{key}' of {said}; "
            f"{instead or 'give the arguments that it was made with'}, or start afresh with init_params=fit.params."
        )


def _described(tree: Any) -> dict[str, tuple[Any, Any]]:
    """Shape and type of every leaf."""

    def dtype(x: Any) -> Any:  # NumPy's double precision becomes single where JAX has no other
        return x.dtype if isinstance(x, jax.Array | jax.ShapeDtypeStruct) else jnp.result_type(x)

    return {jax.tree_util.keystr(k): (jnp.shape(v), dtype(v)) for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def parse_posterior(posterior: Any, kernel: Any, num_moves: Any) -> Particles:
    """How the particles are kept, from either of the two ways to say it.

    Raises:
        TypeError, ValueError: naming the argument that is off.
    """
    if posterior is not None:
        if not isinstance(posterior, Particles):
            raise TypeError(f"posterior must be Particles() or another way to keep particles, got {posterior!r}.")
        if kernel is not None or num_moves is not None:
            raise ValueError(
                f"kernel and num_moves belong to posterior: pass {type(posterior).__name__}(kernel=…, num_moves=…)."
            )
        return posterior
    kernel = MALA() if kernel is None else kernel
    if not isinstance(kernel, Kernel):
        raise TypeError(f"kernel must be ULA(), MALA() or Underdamped(), got {kernel!r}.")
    return Particles(kernel, 1 if num_moves is None else count("num_moves", num_moves))


def check_posterior(model: LatentModel, posterior: Particles, refuse: Callable | None) -> None:
    """Refuse what a recipe cannot do, and weights that would need all data at a step that sees a minibatch.

    Raises:
        ModelError: saying what to use instead.
    """
    reason = refuse(model) if refuse is not None else None
    if reason:
        raise ModelError(reason)
    if posterior.weighted and model.subsampled and model.global_sites:
        raise ModelError(
            f"the latent '{model.global_sites[0]}' is global and the data are subsampled: its weights would need all "
            "data at every step. Drop batch_size, or use posterior=Particles()."
        )
