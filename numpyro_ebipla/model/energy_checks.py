"""What an energy and its base must be, and messages for those that are not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, random
from numpyro.distributions.transforms import biject_to

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.validate import as_count
from numpyro_ebipla.kernels.base import AbstractKernel
from numpyro_ebipla.smc.annealing import Annealing

#: Share, and nats, by which rounding may let the same energy differ.
SAME_SHARE, SAME_NATS = 0.01, 1e-4


def extends(full: tuple[int, ...], batch: tuple[int, ...]) -> bool:
    """Return whether ``full`` is what ``batch`` broadcasts to."""
    try:
        return jnp.broadcast_shapes(full, batch) == full
    except ValueError:
        return False


def shape_message(one: tuple[int, ...] | Exception, batch: tuple[int, ...], event: tuple[int, ...]) -> str:
    """Say what is wrong with the shape that an energy returns, and what to do."""
    x = batch + event
    advice = (
        f"It is called with x of shape [..., {', '.join(map(str, x))}] and must return one energy for each "
        "x, without the event's axes."
    )
    if isinstance(one, Exception):
        return (
            f"EnergyPrior: the energy failed on x of shape {x}: {one}\n{advice} If it uses covariates of the "
            "data, give the base their batch shape: base.expand([batch_size])."
        ) + (" A base of vectors needs .to_event(1)." if event == () else "")
    hint = "squeeze its last axis" if one[-1:] == (1,) else "did you forget .to_event() on the base, or a sum?"
    return f"EnergyPrior: the energy returns shape {one} for x of shape {x}, expected {batch}: {hint}. {advice}"


def check_base(energy: Any, base: Any) -> None:
    """Raise unless the energy can be called and the base sampled.

    Raises:
        TypeError, ValueError: saying what to pass instead.
    """
    if not callable(energy):
        raise TypeError(
            f"EnergyPrior: energy must be callable, got {type(energy).__name__}; pass a bound module "
            "(flax_module, nnx_module, eqx_module) or a function of x."
        )
    if not isinstance(base, dist.Distribution):
        raise TypeError(f"EnergyPrior: base must be a NumPyro distribution, got {type(base).__name__}.")
    if base.support is None or base.support.is_discrete:
        raise ValueError(
            f"EnergyPrior: base {type(base).__name__} is discrete; an energy prior needs a continuous support."
        )
    try:
        biject_to(base.support)
    except NotImplementedError as e:
        raise ValueError(
            f"EnergyPrior: base {type(base).__name__} has the support {base.support}, for which NumPyro has no map "
            "from unconstrained numbers: choose a base on another space, such as angles or what is divided by its norm."
        ) from e
    try:
        jax.eval_shape(lambda k: base.sample(k), random.key(0))
    except NotImplementedError as e:
        raise ValueError(
            f"EnergyPrior: base {type(base).__name__} has no `sample`; the walkers start as draws of the "
            "base, so choose a proper distribution that can be sampled."
        ) from e


def check_real(dtype: Any) -> None:
    """Raise unless an energy has a gradient.

    Raises:
        ValueError: naming the type that it returns.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"EnergyPrior: the energy returns numbers of type {dtype}; Langevin moves need its gradient, so it must "
            "return floating-point numbers that vary smoothly with x."
        )


def is_close(alone: Array, among: Array) -> Array:
    """Return whether energies agree as far as rounding, in half precision at worst, lets one say."""
    return jnp.all(jnp.abs(alone - among) <= SAME_SHARE * (jnp.abs(alone) + jnp.abs(among)) + SAME_NATS)


def check_pointwise(name: str, alone: bool, unchanged: bool) -> None:
    """Raise unless an energy is a function of each point by itself.

    Args:
        name: of the site.
        alone: whether a point has the same energy alone as among others.
        unchanged: whether a call leaves what the energy holds as it is.

    Raises:
        ModelError: saying what to use instead.
    """
    if not alone:
        raise ModelError(
            f"the energy at '{name}' of a point depends on the other points that it is called with, so it is no "
            "function of x: use a layer without batch statistics (LayerNorm, use_running_average=True), and reduce "
            "over the event's axes only."
        )
    if not unchanged:
        raise ModelError(
            f"the energy at '{name}' writes a state that it holds (spectral norm, batch norm, dropout), which is never "
            "updated here, as walkers and particles would each write another: compute what it needs from the "
            "parameters in each call, or fix the state (update_stats=False, use_running_average=True, "
            "deterministic=True)."
        )


def is_bare_module(energy: Any) -> bool:
    """Return whether an energy is a module of a library, not bound by NumPyro."""
    bases = type(energy).__mro__
    return any(c.__module__.partition(".")[0] in ("equinox", "flax") and c.__name__ == "Module" for c in bases)


def check_options(num_walkers: Any, annealing: Any, kernel: Any) -> None:
    """Raise unless the options of an energy prior are sound.

    Raises:
        ValueError, TypeError: naming the option.
    """
    as_count("EnergyPrior: num_walkers", num_walkers)
    if not isinstance(annealing, Annealing):
        raise TypeError(f"EnergyPrior: annealing must be Annealing(…), got {annealing!r}.")
    if not isinstance(kernel, AbstractKernel | None):
        raise TypeError(f"EnergyPrior: kernel must be MALA(), ULA(), Underdamped() or None, got {kernel!r}.")
