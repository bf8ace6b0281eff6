"""Arguments and states refused by name, before any long work."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_ebipla._core.errors import ModelError, x64_hint
from numpyro_ebipla._core.state import TrainState
from numpyro_ebipla._core.static import constants_are_traced, is_array, is_traced
from numpyro_ebipla._core.tree import by_path
from numpyro_ebipla._core.validate import count
from numpyro_ebipla.kernels.mala import MALA, Kernel
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.particles.persistent import Particles
from numpyro_ebipla.training.step import Config
from numpyro_ebipla.walkers.base import Annealed, WalkerStrategy
from numpyro_ebipla.walkers.tempered import Tempered


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


def check_is_state(state: Any, argument: str = "state") -> None:
    """Refuse what is no state, such as a fit.

    Raises:
        TypeError: naming the argument.
    """
    if not isinstance(state, TrainState):
        raise TypeError(f"{argument} must be the state of a fit (fit.state), got {type(state).__name__}.")


def check_state(config: Config, fresh: TrainState, state: Any, argument: str) -> None:
    """Refuse a state of another model, plate size, precision or configuration than ``fresh``, which may be shapes only.

    Raises:
        TypeError, ModelError
    """
    check_is_state(state, argument)
    if _same_shapes(state._replace(rng_key=None), fresh._replace(rng_key=None)):  # a loop over update asks each time
        return
    model = config.model
    for name, value in state.posterior.local.items():
        if name in model.latents and value.shape[1] != model.num_data:
            plate = model.plate.name if model.plate else ""
            raise ModelError(
                f"{argument} holds particles of {value.shape[1]} data at '{name}', but the plate '{plate}' now has "
                f"{model.num_data}: a state belongs to its data; start afresh with init_params=fit.params."
            )

    sites = {*state.posterior.local, *state.posterior.glob}
    if sites != {*model.latents} or {*state.prior} != {*model.energies}:
        raise ModelError(
            f"{argument} has latents {sorted(sites)} and energy priors {sorted(state.prior)}, the model has "
            f"{sorted(model.latents)} and {sorted(model.energies)}."
        )
    number = {v.shape[0] for v in jax.tree.leaves((state.posterior.local, state.posterior.glob))}
    if number - {config.num_particles}:
        raise ModelError(
            f"{argument} has {' and '.join(map(str, sorted(number)))} particles, this EBIPLA {config.num_particles}: "
            f"pass num_particles={min(number)}."
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


def _described(tree: Any) -> dict[str, tuple[Any, Any]]:
    """Shape and type of every leaf."""
    return {path: _shape_and_type(leaf) for path, leaf in by_path(tree).items()}


def _shape_and_type(x: Any) -> tuple[Any, Any]:
    if isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        return x.shape, x.dtype
    return np.shape(x), jnp.result_type(x)  # NumPy's double precision becomes single where JAX has no other


def _same_shapes(tree: Any, other: Any) -> bool:
    (leaves, structure), (others, its_structure) = jax.tree.flatten(tree), jax.tree.flatten(other)
    same: Any = structure == its_structure  # type: ignore[operator]
    return same and all(_shape_and_type(x) == _shape_and_type(y) for x, y in zip(leaves, others, strict=True))


def check_options(model: Callable, method: Callable, options: dict[str, Any]) -> None:
    """Refuse options of a method that are given, where the model has arguments of their names and might be meant.

    Raises:
        ModelError: naming the option.
    """
    try:
        theirs = inspect.signature(model).parameters
    except ValueError:  # no signature, e.g. a callable from C
        return
    own = inspect.signature(method).parameters
    for name, value in options.items():
        if name in theirs and value is not own[name].default:
            raise ModelError(
                f"'{name}' is an option of {method.__name__}, and so cannot be passed on to the model, which has an "
                "argument of that name: rename the model's."
            )


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


def walkers_of(model: LatentModel, prior: Any) -> dict[str, WalkerStrategy]:
    """The strategy of every energy prior, from the one way or the several to say it.

    Raises:
        ModelError: for a site without an energy prior, or a strategy that cannot serve it.
    """
    walkers = {}
    for name, site in model.energies.items():
        chosen = prior.get(name) if isinstance(prior, dict) else prior
        if chosen is None:
            chosen = Annealed(num_walkers=64) if site.per_datum else Tempered()
        if site.per_datum and not chosen.per_datum:
            raise ModelError(
                f"the energy prior at '{name}' is conditional on covariates of the data, so each datum has a "
                f"normaliser of its own; {type(chosen).__name__} cannot serve it: use prior=Annealed()."
            )
        walkers[name] = chosen
    for name in prior if isinstance(prior, dict) else ():
        if name not in model.energies:
            raise ModelError(f"prior: there is no energy prior at '{name}'; there are {list(walkers)}.")
    return walkers


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
