"""What a model's trace says besides numbers: its latents, energies and data plate, or that it cannot be fitted."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.transforms import biject_to
from numpyro.infer.inspect import get_dependencies

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.static import split_static
from numpyro_ebipla.model.energy import EnergyPrior, unwrap


class LatentSite(NamedTuple):
    """A latent sample site.

    Attributes:
        local: whether it lies inside the data plate.
        axis: axis of the data plate in the unconstrained value, counted from the right (local sites).
        value_axis: the same in the constrained value.
    """

    local: bool
    axis: int
    value_axis: int


class EnergySite(NamedTuple):
    """An energy prior.

    Attributes:
        observed: whether it is.
        per_datum: whether every datum has a normaliser of its own.
        axis: axis of the data plate in a value, counted from the right, if it is.
    """

    observed: bool
    per_datum: bool
    axis: int | None = None


class DataPlate(NamedTuple):
    """The plate whose elements are the data: its name, ``M`` and ``B``."""

    name: str
    size: int
    batch_size: int

    def holds(self, site: dict[str, Any]) -> bool:
        """Return whether a site of a trace lies in it."""
        return any(frame.name == self.name for frame in site["cond_indep_stack"])

    def dim(self, site: dict[str, Any]) -> int:
        """Return its dimension, from the right, in the batch shape of a site in it."""
        return next(frame.dim for frame in site["cond_indep_stack"] if frame.name == self.name)

    def by_datum(self, value: Array, site: dict[str, Any]) -> Array:
        """Return ``[B, n]`` from an array in the batch shape of a site in it."""
        value = jnp.moveaxis(value, self.dim(site), 0)
        return value.reshape(value.shape[0], -1)


class Joint(NamedTuple):
    """Log densities of N particles and what comes with them.

    Attributes:
        per_datum: ``[N, B]`` the sum of all sites inside the data plate, for each datum.
        rest: ``[N]`` the sum of all others.
        mutable: new values at ``mutable`` sites, of the first particle.
        potentials: ``{energy site: minus the unnormalised log density}`` of the particles (data, if it is observed).
    """

    per_datum: Array
    rest: Array
    mutable: dict[str, Any]
    potentials: dict[str, Array]


class ModelLayout(NamedTuple):
    """What a trace says besides numbers: fields of :class:`LatentModel`, and names.

    ``strays`` are latents of the data plate that are global, as a site depends on them that lies in another plate of no
    more elements: ``{latent: (site, plate)}``.
    """

    latents: dict[str, LatentSite]
    energies: dict[str, EnergySite]
    plate: DataPlate | None
    constraints: Any
    deterministic: tuple[str, ...]
    strays: dict[str, tuple[str, str]]
    notes: tuple[str, ...]


def lay_out(model: Callable, trace: dict[str, Any], args: tuple, kwargs: dict[str, Any]) -> ModelLayout:
    """Return the layout of a traced model.

    Raises:
        ModelError: for all that the sites alone show to be impossible.
    """
    sites = {name: site for name, site in trace.items() if site["type"] == "sample"}
    latent = {name: site for name, site in sites.items() if not site["is_observed"]}
    for name, site in latent.items():
        if site["fn"].support is not None and site["fn"].support.is_discrete:
            raise ModelError(
                f"latent site '{name}' is discrete ({type(unwrap(site['fn'])).__name__}); Langevin particles "
                "need continuous latents: marginalise it (e.g. dist.MixtureSameFamily) or observe it."
            )
    energies = {name: s for name, s in sites.items() if isinstance(unwrap(s["fn"]), EnergyPrior)}
    if not latent and not any(energies[name]["is_observed"] for name in energies):
        raise ModelError(
            "nothing to do: the model has no latent site and no observed EnergyPrior. Give it a "
            "numpyro.sample site without obs=, or obs= on an EnergyPrior; parameters alone are fitted by SVI."
        )
    for name, site in latent.items():
        _check_support(name, site["fn"])
    plate = _data_plate(trace, sites, latent)
    _check_batches(trace, sites)
    dependencies = _dependencies(model, trace, args, kwargs) if latent else {}
    _check_energies(energies, dependencies)
    latents = _latent_sites(latent, plate, dependencies)
    energy_sites = {name: _energy_site(name, site, plate) for name, site in energies.items()}
    if not any(site["is_observed"] for site in sites.values()):
        raise ModelError(
            f"the model observes nothing, so nothing says where '{next(iter(latent))}' is: pass the data, which go to "
            "obs=. To draw from the model as it is, use numpyro.infer.Predictive."
        )
    return ModelLayout(
        latents,
        energy_sites,
        plate,
        split_static(constraints_of(trace))[1],
        tuple(n for n, s in trace.items() if s["type"] == "deterministic"),
        _strays(sites, latents, plate, dependencies, trace),
        _say_why_global(latents, plate, sites, dependencies),
    )


def _dependencies(model: Callable, trace: dict, args: tuple, kwargs: dict) -> dict[str, Any]:
    known = {n: s["value"] for n, s in trace.items() if s["type"] in ("param", "mutable", "plate")}
    return get_dependencies(handlers.substitute(model, data=known), args, kwargs)


def _check_energies(energies: dict, dependencies: dict) -> None:
    prior = dependencies.get("prior_dependencies", {})
    for name in energies:
        upstream = sorted(set(prior.get(name, ())) - {name})
        if upstream:
            kind = "another energy prior" if upstream[0] in energies else "the latent"
            raise ModelError(
                f"the energy prior at '{name}' depends on {kind} '{upstream[0]}', so its normaliser would "
                f"depend on '{upstream[0]}' too and is not estimated. Put both into one site with a joint "
                "energy, or make the dependence part of the likelihood (numpyro.factor with a normalised "
                "prior)."
            )


def _check_support(name: str, fn: Any) -> None:
    """Raise for a latent that particles cannot move in.

    Raises:
        ModelError: naming it.
    """
    try:
        biject_to(fn.support)
    except NotImplementedError as e:
        raise ModelError(
            f"latent site '{name}' ({type(unwrap(fn)).__name__}) has the support {fn.support}, for which NumPyro has "
            "no map from unconstrained numbers: reparametrise it (for a direction, numpyro.handlers.reparam with "
            "ProjectedNormalReparam)."
        ) from e


def _check_batches(trace: dict, sites: dict) -> None:
    """Raise for observations of all data where a plate shows some of them at a time.

    Raises:
        ModelError: naming the site and the plate.
    """
    for name, site in sites.items():
        shape = jnp.shape(site["value"])
        for frame in site["cond_indep_stack"]:
            size, axis = trace[frame.name]["args"][0], frame.dim - site["fn"].event_dim
            if frame.size < size == (shape[axis] if -axis <= len(shape) else 0):
                raise ModelError(
                    f"'{name}' has values for all {size} data of the plate '{frame.name}', of which {frame.size} are "
                    "visited at a time: give it these alone, as by obs=numpyro.subsample(y, event_dim=…) or y[idx]. "
                    "What handlers.condition puts in is not cut: pass such data as an argument."
                )


def _data_plate(trace: dict, sites: dict, latent: dict) -> DataPlate | None:
    """Return the plate to treat as data: the subsampled one, else the one with most latent values in it."""
    sizes = {n: (s["args"][0], len(s["value"])) for n, s in trace.items() if s["type"] == "plate"}
    names = {f.name: None for s in sites.values() for f in s["cond_indep_stack"]}  # in order
    subsampled = [n for n, (size, batch) in sizes.items() if batch < size and n in names]
    if len(subsampled) > 1:
        raise ModelError(
            f"plates {subsampled} are all subsampled; only one may be: pass subsample_size=None to the others."
        )

    def count(name: str, among: dict) -> int:
        inside = [s for s in among.values() if any(f.name == name for f in s["cond_indep_stack"])]
        return sum(int(np.size(s["value"])) for s in inside)

    candidates = subsampled or sorted(
        names, key=lambda n: (count(n, latent), count(n, sites), sizes[n][0]), reverse=True
    )
    if not candidates:
        return None
    name = candidates[0]
    return DataPlate(name, *sizes[name])


def _latent_sites(latent: dict, plate: DataPlate | None, dependencies: dict) -> dict[str, LatentSite]:
    """Return which latents are local, and where their data axis is."""
    inside = {n for n, s in latent.items() if plate and plate.holds(s)}
    posterior = dependencies.get("posterior_dependencies", {})
    coupled = sorted({u for u in inside for v in inside if plate and plate.name in posterior.get(u, {}).get(v, ())})
    if coupled and plate and plate.batch_size < plate.size:
        raise ModelError(
            f"latent '{coupled[0]}' in the subsampled plate '{plate.name}' is coupled across its elements by "
            "a site outside the plate, so its particles cannot be updated batch by batch: pass "
            "subsample_size=None."
        )
    if coupled:  # one block: particles of all data are accepted or refused together
        inside = set()
    result = {}
    for name, site in latent.items():
        transform = biject_to(site["fn"].support)
        shrink = transform.codomain.event_dim - transform.domain.event_dim
        event_dim = site["fn"].event_dim
        dim = plate.dim(site) if plate and plate.holds(site) else -1
        result[name] = LatentSite(name in inside, dim - event_dim + shrink, dim - event_dim)
    return result


def _strays(
    sites: dict, latents: dict[str, LatentSite], plate: DataPlate | None, dependencies: dict, trace: dict
) -> dict[str, tuple[str, str]]:
    found = {}
    for latent, layout in latents.items():
        if plate is None or layout.local or not plate.holds(sites[latent]):
            continue
        for name, needs in dependencies["prior_dependencies"].items():
            if name == latent or latent not in needs or plate.holds(sites[name]):
                continue
            for frame in sites[name]["cond_indep_stack"]:
                if trace[frame.name]["args"][0] <= plate.size:
                    found[latent] = (name, frame.name)
    return found


def _say_why_global(
    latents: dict[str, LatentSite], plate: DataPlate | None, sites: dict, dependencies: dict
) -> tuple[str, ...]:
    """Return a line for each reason why latents in a plate are global all the same."""
    prior = dependencies.get("prior_dependencies", {})
    frames = lambda name: {frame.name for frame in sites[name]["cond_indep_stack"]}
    found: dict[str, list[str]] = {}
    for name in latents:
        if plate is None or latents[name].local or not frames(name):
            continue
        outside = [n for n in sites if name in prior.get(n, ()) and not frames(name) <= frames(n)]
        why = f"'{outside[0]}' lies outside its plate" if outside else f"the data plate is '{plate.name}'"
        found.setdefault(why, []).append(name)
    return tuple(f"{', '.join(names)}: global, as {why}" for why, names in found.items())


def _energy_site(name: str, site: dict, plate: DataPlate | None) -> EnergySite:
    shape = unwrap(site["fn"]).batch_shape
    if plate is None or not plate.holds(site):
        return EnergySite(bool(site["is_observed"]), False)
    dim = plate.dim(site)
    per_datum = len(shape) >= -dim and shape[dim] == plate.batch_size
    if per_datum and int(np.prod(shape)) != plate.batch_size:
        raise ModelError(
            f"the energy prior at '{name}' is conditional on the data plate and on another plate at once "
            f"(batch shape {shape}): put the other plate's dimension into the event with .to_event()."
        )
    return EnergySite(bool(site["is_observed"]), per_datum, dim - site["fn"].event_dim if per_datum else None)


def constraints_of(trace: dict[str, Any]) -> dict[str, Any]:
    """Return ``{param: constraint}`` for all that are constrained."""
    found = {
        name: site["kwargs"].get("constraint", constraints.real)
        for name, site in trace.items()
        if site["type"] == "param"
    }
    return {name: constraint for name, constraint in found.items() if constraint is not constraints.real}
