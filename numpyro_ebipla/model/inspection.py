"""One look at a NumPyro model before any long work: its layout, and errors for what cannot be fitted."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core
from numpyro import handlers
from numpyro.distributions.transforms import biject_to
from numpyro.ops.provenance import eval_provenance

from numpyro_ebipla._core.convolutions import has_convolutions
from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Params
from numpyro_ebipla._core.static import join_static, split_static
from numpyro_ebipla._core.tree import all_finite, strong_type
from numpyro_ebipla.model.arguments import as_arrays, check_arguments, like_own, without_held
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.energy import unwrap
from numpyro_ebipla.model.energy_checks import check_pointwise, is_bare_module, is_close
from numpyro_ebipla.model.first_trace import first_trace, needs_a_number, wants_a_number
from numpyro_ebipla.model.handlers import from_base, hold_params, trace_model
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.model.layout import ModelLayout, constraints_of, lay_out
from numpyro_ebipla.model.observed import censored_at_edges, check_numbers, is_missing, is_outside

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
        pointwise: ``{energy site: (is an energy that of its point alone, does it leave what it holds as it is)}``.
        constraints: arrays in the parameters' constraints, see :func:`_param_transforms`.
        outside: ``{observed site: whether a value lies outside its distribution's support}``.
        missing: ``{observed site: whether a value is NaN}``.
    """

    params: Params
    mutable: dict[str, Any]
    energies: dict[str, Array]
    pointwise: dict[str, tuple[Array, Array]]
    constraints: Any
    outside: dict[str, Array]
    missing: dict[str, Array]


class Inspection(NamedTuple):
    """What :func:`inspect_model` finds.

    Attributes:
        model: the pure functions.
        data: the model's array arguments.
        params: initial parameters, unconstrained.
        mutable: initial values at ``mutable`` sites.
        energy_params: names of the parameters on which an energy depends, but no base distribution.
        look: ``(rng_key, init_params, data) -> InitialNumbers``, compiled: for other keys and initial values.
        program: the model's log density; None if it has none, as the first step will say.
        digest: of this program, with all numbers that it holds: see :func:`digest_of`.
        note: what a run should say of the model before it begins.
    """

    model: LatentModel
    data: Any
    params: Params
    mutable: dict[str, Any]
    energy_params: tuple[str, ...]
    look: Callable
    program: core.ClosedJaxpr | None = None
    digest: str = ""
    note: str = ""

    @property
    def layout(self) -> Any:
        """What two inspections of one model agree in if the same programs serve both, besides the digest."""
        model, shapes = self.model, jax.tree.map(jnp.shape, (self.params, self.mutable))
        names = (self.energy_params, model.deterministic, [*model.param_transforms])
        return shapes, names, model.latents, model.energies, model.plate

    def for_key(self, rng_key: Array, init_params: Params | None, data: Any) -> "Inspection":
        """Return the inspection with the initial numbers for another key."""
        given = without_held("init_params", as_arrays("init_params", init_params), self.model.held)
        params, mutable = _checked(self.look(rng_key, given, data))
        return self._replace(data=data, params=params, mutable=mutable)


def inspect_model(
    model: Callable,
    rng_key: Array,
    args: tuple,
    kwargs: dict[str, Any],
    init_params: Params | None = None,
    hold: Params | None = None,
) -> Inspection:
    """Trace ``model(*args, **kwargs)`` once and lay out its parameters, latents, energies and data.

    Those in ``hold`` are constants in what is returned.

    Raises:
        ModelError: naming the site or argument, for everything that cannot be fitted.
    """
    check_arguments(model, args, kwargs)
    data, static = split_static((args, kwargs))
    data = jax.tree.map(jnp.asarray, data)
    held = _check_held(model, rng_key, args, kwargs, as_arrays("hold", hold))
    model = censored_at_edges(hold_params(model, held) if held else model)
    given = without_held("init_params", as_arrays("init_params", init_params), held)
    found: list[ModelLayout] = []

    # One program instead of a hundred small ones, to be run once or twice: it is the compilation that costs.
    # The layout leaves it on the side.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def look(rng_key: Array, init_params: Params, data: Any) -> InitialNumbers:
        args, kwargs = join_static(data, static)
        trace = first_trace(model, rng_key, args, kwargs)
        if init_params:
            own = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
            init_params = like_own("init_params", init_params, own)
            bound = handlers.substitute(model, data=init_params)
            trace = trace_model(from_base(handlers.seed(bound, rng_key)), args, kwargs)
        _check_types(trace)
        layout = lay_out(model, trace, args, kwargs)
        found.append(layout)
        return _numbers(trace, layout)

    try:
        first = look(rng_key, given, data)
    except Exception as e:
        if not wants_a_number(e):
            raise
        raise needs_a_number(model, rng_key, args, kwargs, e) from e
    params, mutable = _checked(first)
    layout = found[0]
    latent_model = LatentModel(
        model=model,
        static_arguments=static,
        param_transforms=_param_transforms(join_static(first.constraints, layout.constraints)),
        latents=layout.latents,
        energies=layout.energies,
        plate=layout.plate,
        held=held,
        notes=layout.notes,
        deterministic=layout.deterministic,
    )
    energy_params = _energy_params(latent_model, params, data, mutable) if layout.energies else ()
    program = _program_of(latent_model, params, mutable, data)
    latent_model = replace(latent_model, convolves=program is not None and has_convolutions(program.jaxpr))
    found_now = Inspection(latent_model, data, params, mutable, energy_params, look, program, _digest(program))
    return found_now._replace(note=_note(found_now, layout.strays))


def _note(inspection: Inspection, strays: dict[str, tuple[str, str]]) -> str:
    """Return what to say of latents that are global although their elements are independent given all else."""
    model = inspection.model
    if not strays or model.plate is None or not _separable(inspection, [*strays]):
        return ""
    latent, (site, plate) = next(iter(strays.items()))
    return (
        f"latent '{latent}' of plate '{model.plate.name}' is treated as global, all of it as one block, as '{site}' "
        f"depends on it and lies in plate '{plate}'. If both plates run over the same data, give them one name, and "
        f"each datum has particles of its own. If '{plate}' has some of the data only, put '{site}' into "
        f"'{model.plate.name}', and hide the data that lack it with numpyro.handlers.mask."
    )


def _separable(inspection: Inspection, names: list[str]) -> bool:
    """Return whether elements of latents along the data plate do not act on each other's gradients, all else fixed."""
    model = inspection.model
    batch = Batch(None, inspection.data, jax.random.key(0), inspection.mutable)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def look(params: Params, batch: Batch) -> Array:
        params = model.constrain_params(params)
        local, here = model.draw_latents(params, batch)
        other = model.draw_latents(params, batch._replace(rng_key=jax.random.key(1)))[1]
        moved = jax.random.bernoulli(jax.random.key(2), shape=(model.num_data,))
        along = {n: jnp.expand_dims(moved, range(1, -model.latents[n].axis)) for n in names}
        there = here | {n: jnp.where(along[n], other[n], here[n]) for n in names}

        def density(shared: Any) -> Array:
            one_local, one_shared = jax.tree.map(lambda x: x[None], (local, shared))
            joint = model.log_joint(params, one_local, one_shared, batch, {})
            return joint.per_datum.sum() + joint.rest.sum()

        before, after = jax.grad(density)(here), jax.grad(density)(there)
        same = [jnp.isclose(before[n], after[n], rtol=1e-3, atol=1e-4) | along[n] for n in names]
        return jnp.all(jnp.stack([x.all() for x in same]))

    return bool(look(inspection.params, batch))


def digest_of(model: LatentModel, params: Params, mutable: dict[str, Any], data: Any) -> str:
    """Return a digest of the model's log density as it is now.

    A program once compiled keeps the numbers that the model had from closures, globals and objects. If one of these has
    changed, so has the digest, and the program must be made anew.
    """
    return _digest(_program_of(model, params, mutable, data))


def count_operations(inspection: Inspection) -> float:
    """Return the floating-point operations of the log density of a minibatch, with one particle, as XLA counts them."""
    if inspection.program is None:
        return 0.0
    cost = jax.jit(core.jaxpr_as_fun(inspection.program)).lower(*inspection.program.in_avals).cost_analysis()
    return float((cost or {}).get("flops", 0.0))


def _program_of(model: LatentModel, params: Params, mutable: dict[str, Any], data: Any) -> core.ClosedJaxpr | None:
    """Return the model's log density as a program; None if there is none, as the first step will say."""

    def log_density(params: Params, mutable: dict[str, Any], data: Any, rng_key: Array) -> Any:
        batch = Batch(model.blocks(joint=False)[0], data, rng_key, mutable)
        params = model.constrain_params(params)
        local, shared = jax.tree.map(lambda x: x[None], model.draw_latents(params, batch))
        joint = model.log_joint(params, local, shared, batch, {})
        return joint.per_datum, joint.rest

    try:
        return jax.make_jaxpr(log_density)(params, mutable, data, jax.random.key(0))
    except Exception:  # whatever it is: nothing is compiled that could be out of date
        return None


def _digest(program: core.ClosedJaxpr | None) -> str:
    if program is None:
        return ""
    digest = hashlib.sha256(ADDRESS.sub("", str(program.jaxpr)).encode())
    for held in program.consts:
        if not jnp.issubdtype(held.dtype, jax.dtypes.prng_key):
            digest.update(np.asarray(held).tobytes())
    return digest.hexdigest()


def _check_held(model: Callable, rng_key: Array, args: tuple, kwargs: dict[str, Any], hold: Params) -> Params:
    """Return the values to hold in the model's own types.

    Raises:
        ModelError: naming a parameter that there is not, or whose value has another shape or violates its constraint.
    """
    if not hold:
        return {}
    data, static = split_static((args, kwargs))

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def look(rng_key: Array, hold: Params, data: Any) -> tuple[Params, dict[str, Array]]:
        trace = trace_model(from_base(handlers.seed(model, rng_key)), *join_static(data, static))
        sites = {name: site for name, site in trace.items() if site["type"] == "param"}
        held = like_own("hold", hold, {name: site["value"] for name, site in sites.items()})
        constraints = constraints_of(sites)
        inside = {n: jnp.all(constraints[n](value)) for n, value in held.items() if n in constraints}
        return held, inside | {n: all_finite(value) for n, value in held.items() if n not in constraints}

    held, inside = look(rng_key, hold, jax.tree.map(jnp.asarray, data))
    for name, sound in inside.items():
        if not sound:
            raise ModelError(f"hold: the value of '{name}' is not finite or violates its constraint.")
    return held


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
    draws = {n: d.sample_base(jax.random.key(0), TRIED) for n, d in densities.items()}
    energies = {n: d.energy(draws[n]) for n, d in densities.items()}
    alone = {n: d.energy(draws[n][:1]) for n, d in densities.items()}
    pointwise = {n: (is_close(alone[n], energies[n][:1]), ~p.writes(draws[n])) for n, p in priors.items()}
    observed = {n: s for n, s in trace.items() if s["type"] == "sample" and s["is_observed"]}
    outside, missing = ({n: f(s) for n, s in observed.items()} for f in (is_outside, is_missing))
    arrays = jax.tree.map(jnp.copy, split_static(constrained)[0])
    return InitialNumbers(strong_type(params), strong_type(mutable), energies, pointwise, arrays, outside, missing)


def _checked(numbers: InitialNumbers) -> tuple[Params, dict[str, Any]]:
    """Return parameters and mutable values, checked.

    Raises:
        ModelError: if something is not finite, or outside its support.
    """
    params, mutable, energies, pointwise, _, outside, missing = numbers
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
    for name, (alone, unchanged) in pointwise.items():
        check_pointwise(name, bool(alone), bool(unchanged))
    for name, value in missing.items():
        if bool(value):
            raise ModelError(
                f"observed values at '{name}' contain NaN: remove these data, or replace them and hide them with "
                "numpyro.handlers.mask, or wrap the model in nan_masked."
            )
    for name, value in outside.items():
        if bool(value):
            raise ModelError(
                f"observed values at '{name}' lie outside the support of their distribution: check the data, "
                "or choose a distribution that covers them."
            )
    return params, mutable


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
            check_numbers(name, site["value"])


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
    """Return the parameters on which energies depend, but no base: a base has no walkers that must follow it.

    Raises:
        ModelError: for a module that depends on none, as its weights are not parameters.
    """
    bare: dict[str, bool] = {}

    def arrays(**params: Any) -> Any:
        batch = Batch(model.blocks(joint=False)[0], data, jax.random.key(0), mutable)
        priors = model.energy_priors(model.constrain_params(params), batch)
        bare.update({name: is_bare_module(prior.function) for name, prior in priors.items()})
        densities = [priors[name].tilted() for name in model.energies]
        draws = [d.sample_base(jax.random.key(0), 1) for d in densities]
        at = list(zip(densities, draws, strict=True))
        return [d.log_base(x) for d, x in at], [d.energy(x) for d, x in at]

    base, energy = eval_provenance(arrays, **params)
    names = lambda found: set().union(*jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, frozenset)))
    for name, found in zip(model.energies, energy, strict=True):
        if not found and bare[name]:
            raise ModelError(
                f"the energy at '{name}' is a module whose weights are constants, so nothing of it would be fitted: "
                "bind it by eqx_module(name, module) or nnx_module(name, module) inside the model; if it is to stay "
                "as it is, pass lambda x: module(x)."
            )
    return tuple(sorted(names(energy) - names(base)))
