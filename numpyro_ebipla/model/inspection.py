"""One look at a NumPyro model before any long work: its layout, and errors for what cannot be fitted."""

import hashlib
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.distributions.transforms import biject_to
from numpyro.ops.provenance import eval_provenance

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Params
from numpyro_ebipla._core.static import is_array, join_static, split_static
from numpyro_ebipla._core.tree import all_finite, strong_type
from numpyro_ebipla.model.arguments import as_arrays, check_arguments, like_own, name_arguments
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.energy import unwrap
from numpyro_ebipla.model.handlers import check_loops, check_plates, from_base, trace_model
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.model.layout import ModelLayout, constraints_of, lay_out

#: JAX's errors where a number of Python is wanted and a traced array found.
NEEDS_A_NUMBER = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.TracerArrayConversionError,
)

#: Of objects, in the text of a program.
ADDRESS = re.compile(r"\b0x[0-9a-f]+")
#: Draws of a base at which its energy is tried out.
TRIED = 8


class InitialNumbers(NamedTuple):
    """The numbers that a model starts with, for one key.

    Attributes:
        params: initial parameters, unconstrained.
        mutable: initial values at ``mutable`` sites.
        energies: ``{energy site: energies at some draws of its base}``.
        constraints: arrays in the parameters' constraints, see :func:`_param_transforms`.
        outside: ``{observed site: whether a value lies outside its distribution's support}``.
    """

    params: Params
    mutable: dict[str, Any]
    energies: dict[str, Array]
    constraints: Any
    outside: dict[str, Array]


class Inspection(NamedTuple):
    """What :func:`inspect_model` finds.

    Attributes:
        model: the pure functions.
        data: the model's array arguments.
        params: initial parameters, unconstrained.
        mutable: initial values at ``mutable`` sites.
        energy_params: names of the parameters on which an energy depends, but no base distribution.
        look: ``(rng_key, init_params, data) -> InitialNumbers``, compiled: for other keys and initial values.
        digest: of the model's log density as a program, with all numbers that it holds: see :func:`digest_of`.
    """

    model: LatentModel
    data: Any
    params: Params
    mutable: dict[str, Any]
    energy_params: tuple[str, ...]
    look: Callable
    digest: str = ""

    def for_key(self, rng_key: Array, init_params: Params | None, data: Any) -> "Inspection":
        """Return the inspection with the initial numbers for another key."""
        params, mutable = _checked(self.look(rng_key, as_arrays(init_params), data))
        return self._replace(data=data, params=params, mutable=mutable)


def inspect_model(
    model: Callable,
    rng_key: Array,
    args: tuple,
    kwargs: dict[str, Any],
    init_params: Params | None = None,
) -> Inspection:
    """Trace ``model(*args, **kwargs)`` once and lay out its parameters, latents, energies and data.

    Raises:
        ModelError: naming the site or argument, for everything that cannot be fitted.
    """
    check_arguments(model, args, kwargs)
    data, static = split_static((args, kwargs))
    data = jax.tree.map(jnp.asarray, data)
    found: list[ModelLayout] = []

    # One program instead of a hundred small ones, to be run once or twice: it is the compilation that costs.
    # The layout leaves it on the side.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def look(rng_key: Array, init_params: Params, data: Any) -> InitialNumbers:
        args, kwargs = join_static(data, static)
        trace = _first_trace(model, rng_key, args, kwargs)
        if init_params:
            own = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
            init_params = like_own("init_params", init_params, own)
            bound = handlers.substitute(model, data=init_params)
            trace = trace_model(from_base(handlers.seed(bound, rng_key)), args, kwargs)
        _check_types(trace)
        layout = lay_out(model, trace, args, kwargs)
        found.append(layout)
        return _numbers(trace, layout)

    first = look(rng_key, as_arrays(init_params), data)
    params, mutable = _checked(first)
    layout = found[0]
    latent_model = LatentModel(
        model=model,
        static_arguments=static,
        param_transforms=_param_transforms(join_static(first.constraints, layout.constraints)),
        latents=layout.latents,
        energies=layout.energies,
        plate=layout.plate,
        deterministic=layout.deterministic,
    )
    energy_params = _energy_params(latent_model, params, data, mutable) if layout.energies else ()
    found_now = Inspection(latent_model, data, params, mutable, energy_params, look)
    return found_now._replace(digest=digest_of(found_now))


def digest_of(inspection: Inspection) -> str:
    """Return a digest of the model's log density as it is now.

    A program once compiled keeps the numbers that the model had from closures, globals and objects. If one of these has
    changed, so has the digest, and the program must be made anew.
    """
    model = inspection.model

    def log_density(params: Params, mutable: dict[str, Any], data: Any, rng_key: Array) -> Any:
        batch = Batch(model.blocks(joint=False)[0], data, rng_key, mutable)
        params = model.constrain_params(params)
        local, shared = jax.tree.map(lambda x: x[None], model.draw_latents(params, batch))
        joint = model.log_joint(params, local, shared, batch, {})
        return joint.per_datum, joint.rest

    at = (inspection.params, inspection.mutable, inspection.data, jax.random.key(0))
    try:
        program = jax.make_jaxpr(log_density)(*at)
    except Exception:  # whatever it is: the first step meets it, too, and nothing is compiled that could be out of date
        return ""
    digest = hashlib.sha256(ADDRESS.sub("", str(program.jaxpr)).encode())
    for held in program.consts:
        if not jnp.issubdtype(held.dtype, jax.dtypes.prng_key):
            digest.update(np.asarray(held).tobytes())
    return digest.hexdigest()


def _first_trace(model: Callable, rng_key: Array, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the trace of a model that may not run at all with these arguments.

    Raises:
        ModelError: where NumPyro's or JAX's own error would not say which argument is to blame.
    """
    try:
        sound = check_loops(check_plates(model))
        return trace_model(from_base(handlers.seed(sound, rng_key)), args, kwargs)
    except NEEDS_A_NUMBER as e:
        raise ModelError(
            "the model needs the value of an array argument where only a Python number will do, such as the size of a "
            f"plate: pass it as one (int(…)), then it stays the same in all steps. JAX says: {str(e).splitlines()[0]}"
        ) from e
    except Exception as e:
        named = name_arguments(model, args, kwargs)
        empty = [n for n, value in named.items() if any(np.size(x) == 0 for x in jax.tree.leaves(value) if is_array(x))]
        if not empty:
            raise
        raise ModelError(f"argument '{empty[0]}' of the model is empty, and so it cannot be run: {e}.") from e


def _numbers(trace: dict[str, Any], layout: ModelLayout) -> InitialNumbers:
    """Return the numbers of a trace."""
    constrained = constraints_of(trace)
    transforms = _param_transforms(constrained)
    values = {n: s["value"] for n, s in trace.items() if s["type"] == "param"}
    values = strong_type(jax.tree.map(jnp.asarray, values))
    params = {n: transforms[n].inv(v) if n in transforms else v for n, v in values.items()}
    mutable = {n: s["value"] for n, s in trace.items() if s["type"] == "mutable"}
    priors = {name: unwrap(trace[name]["fn"]) for name in layout.energies}
    densities = {n: prior.tilted() for n, prior in priors.items()}
    energies = {n: d.energy(d.sample_base(jax.random.key(0), TRIED)) for n, d in densities.items()}
    observed = {n: s for n, s in trace.items() if s["type"] == "sample" and s["is_observed"]}
    outside = {n: _outside(s) for n, s in observed.items()}
    arrays = jax.tree.map(jnp.copy, split_static(constrained)[0])
    return InitialNumbers(strong_type(params), strong_type(mutable), energies, arrays, outside)


def _checked(numbers: InitialNumbers) -> tuple[Params, dict[str, Any]]:
    """Return parameters and mutable values, checked.

    Raises:
        ModelError: if something is not finite, or outside its support.
    """
    params, mutable, energies, _, outside = numbers
    for name, value in params.items():
        if not all_finite(value):
            raise ModelError(
                f"the initial value of parameter '{name}' is not finite or violates its constraint: change "
                "it in the model, or by init_params."
            )
    for name, value in energies.items():
        if not np.isfinite(np.asarray(value)).all():
            raise ModelError(
                f"the energy at '{name}' is not finite at draws of its base at the start: check its initial "
                "parameters and the scale of its inputs."
            )
    for name, value in outside.items():
        if bool(value):
            raise ModelError(
                f"observed values at '{name}' lie outside the support of their distribution: check the data, "
                "or choose a distribution that covers them."
            )
    return params, mutable


def _outside(site: dict[str, Any]) -> Array:
    """Return whether an observation lies outside a continuous support; masked ones do not count."""
    fn, none = site["fn"], jnp.zeros((), bool)
    try:
        support = fn.support
    except NotImplementedError:
        return none
    if support is None or support.is_discrete:  # fractions at a Bernoulli site are common use
        return none
    inside = support(site["value"])
    while isinstance(fn, dist.ExpandedDistribution | dist.Independent):
        fn = fn.base_dist
    if isinstance(fn, dist.MaskedDistribution):
        inside = fn.support(site["value"]) | ~jnp.asarray(fn._mask)  # element by element, inside an Independent
    return ~jnp.all(inside)


def _check_types(trace: dict[str, Any]) -> None:
    """Raise for parameters without a gradient, and observations that are not numbers.

    Raises:
        ModelError: naming the site.
    """
    for name, site in trace.items():
        if site["type"] == "param":
            for leaf in jax.tree.leaves(site["value"]):
                if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                    raise ModelError(
                        f"parameter '{name}' is of type {jnp.result_type(leaf)}, but only floating-point numbers have "
                        "gradients: begin at 0.0 instead of 0, say."
                    )
        if site["type"] == "sample" and site["is_observed"]:
            value = site["value"]
            if not isinstance(value, int | float | np.number | np.bool_) and not is_array(value):
                kind, remedy = f"a {type(value).__name__}", "pass jnp.asarray(…)"
                if isinstance(value, np.ndarray):
                    kind, remedy = f"of NumPy's type {value.dtype}", "make numbers of them first"
                raise ModelError(f"observed values at '{name}' are {kind}, not an array of numbers: {remedy}.")
            if jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
                raise ModelError(f"observed values at '{name}' are complex: pass real and imaginary parts.")


def _param_transforms(constrained: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, constraint in constrained.items():
        try:
            found[name] = biject_to(constraint)
        except NotImplementedError as e:
            raise ModelError(
                f"parameter '{name}' has the constraint {constraint}, for which NumPyro has no map from unconstrained "
                "numbers: fit a free parameter, and map it in the model (for a unit vector, divide by its norm)."
            ) from e
    return found


def _energy_params(model: LatentModel, params: Params, data: Any, mutable: dict[str, Any]) -> tuple[str, ...]:
    """Return the parameters on which energies depend, but no base: a base has no walkers that must follow it."""

    def arrays(**params: Any) -> Any:
        batch = Batch(model.blocks(joint=False)[0], data, jax.random.key(0), mutable)
        priors = model.energy_priors(model.constrain_params(params), batch)
        densities = [prior.tilted() for prior in priors.values()]
        draws = [d.sample_base(jax.random.key(0), 1) for d in densities]
        at = list(zip(densities, draws, strict=True))
        return [d.log_base(x) for d, x in at], [d.energy(x) for d, x in at]

    base, energy = eval_provenance(arrays, **params)
    names = lambda found: set().union(*jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, frozenset)))
    return tuple(sorted(names(energy) - names(base)))
