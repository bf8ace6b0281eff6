"""A NumPyro model as pure functions of (parameters, latents, minibatch).

:func:`inspect_model` looks once at the model, refuses what cannot be fitted, and returns a
:class:`LatentModel`. Its methods run the model under handlers that put unconstrained particles at the latent
sites; a data plate's M/B scale is divided out again, so that what belongs to one datum is never rescaled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.distributions.transforms import biject_to

from numpyro_ebipla._core.convolutions import with_fast_convolutions
from numpyro_ebipla._core.state import Params, Sites
from numpyro_ebipla._core.static import join_static
from numpyro_ebipla.model.blocks import Batch, Progress, map_blocks, silent, split_indices
from numpyro_ebipla.model.energy import EnergyPrior, base_only, unwrap
from numpyro_ebipla.model.handlers import (
    copy_containers,
    from_base,
    place,
    place_constrained,
    site_log_prob,
    trace_model,
    unmask_latents,
    unmasked,
)
from numpyro_ebipla.model.layout import DataPlate, EnergySite, Joint, LatentSite
from numpyro_ebipla.smc.density import TiltedDensity


@dataclass(frozen=True, eq=False)
class LatentModel:
    """The model with its layout; see :func:`inspect_model`. Hashed by identity, so that it may be static under jit.

    ``params`` are constrained except in :meth:`constrain_params`. ``notes`` say why latents in plates are global,
    ``convolves`` whether there are convolutions in the densities. What is compiled, ``programs`` and the ``systems``
    that serve more than one object, goes when it goes.
    """

    model: Callable
    static_arguments: Any
    param_transforms: dict[str, Any]
    latents: dict[str, LatentSite]
    energies: dict[str, EnergySite]
    plate: DataPlate | None
    deterministic: tuple[str, ...] = ()
    held: Params = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    convolves: bool = False
    programs: dict[Any, Callable] = field(default_factory=dict, init=False, repr=False)
    systems: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def compiled(self, function: Callable, *static: Any) -> Callable:
        """Return ``function(self, *static, …)``, compiled; the program lives as long as the model does.

        Args:
            function: of the model, some static values and arrays.
            *static: hashable values.
        """
        key = (function, static)
        if key not in self.programs:
            self.programs[key] = self.jit(partial(function, self, *static))
        return self.programs[key]

    def jit(self, function: Callable) -> Callable:
        """Return a function, compiled as suits the densities and the device."""
        return jax.jit(with_fast_convolutions(function) if self.convolves else function)

    @property
    def num_data(self) -> int:
        """``M``: the size of the data plate, one without a plate."""
        return self.plate.size if self.plate else 1

    @property
    def batch_size(self) -> int:
        """``B``."""
        return self.plate.batch_size if self.plate else 1

    @property
    def subsampled(self) -> bool:
        """Whether ``B < M``."""
        return self.batch_size < self.num_data

    @property
    def local_sites(self) -> list[str]:
        """Names of the latents inside the data plate."""
        return [name for name, site in self.latents.items() if site.local]

    @property
    def global_sites(self) -> list[str]:
        """Names of the latents outside it."""
        return [name for name, site in self.latents.items() if not site.local]

    @property
    def independent_data(self) -> bool:
        """Whether the chains of different data are independent, so that each has a log density of its own."""
        return bool(self.local_sites) and not self.global_sites

    def constrain_params(self, unconstrained: Params) -> Params:
        """Return parameters in the space that the model declares."""
        return {
            name: self.param_transforms[name](value) if name in self.param_transforms else value
            for name, value in unconstrained.items()
        }

    def all_params(self, unconstrained: Params) -> Params:
        """Return parameters in the space that the model declares, with those that are held."""
        return self._transformed(LatentModel.constrain_params, unconstrained) | self.held

    def unconstrain_params(self, params: Params) -> Params:
        """Invert :meth:`constrain_params`."""
        return self._transformed(_unconstrained, params)

    def _transformed(self, function: Callable, params: Params) -> Params:
        """Return parameters, mapped where they have a constraint: by one program in place of dozens of small ones."""
        some = {name: value for name, value in params.items() if name in self.param_transforms}
        moved = self.compiled(function)(some) if some else {}
        return {name: moved.get(name, value) for name, value in params.items()}

    # --- densities ------------------------------------------------------------------------------------

    def log_joint(self, params: Params, local: Sites, shared: Sites, batch: Batch, log_z: dict[str, Array]) -> Joint:
        """Return log densities of N particles, in unconstrained space (Jacobians included).

        Args:
            params: constrained parameters.
            local: ``{site: [N, B, *event]}``.
            shared: ``{site: [N, *event]}``.
            batch: data to visit.
            log_z: ``{energy site: log normaliser}``, broadcasting to its batch shape; zero if missing.
        """

        def one(local: Sites, shared: Sites) -> Joint:
            trace, log_det = self.trace(params, local, shared, batch)
            per_datum = jnp.zeros((self.width(batch),))
            rest = jnp.zeros(())
            for name, site in trace.items():
                if site["type"] != "sample":
                    continue
                value = site_log_prob(site, log_det.get(name), log_z.get(name, jnp.zeros(())))
                if self.is_local(site):
                    per_datum += self.by_datum(value / self.ratio(batch), site).sum(-1)
                else:
                    rest += value.sum()
            state = {name: trace[name]["value"] for name in batch.mutable}
            potentials = {name: unwrap(trace[name]["fn"]).potential(trace[name]["value"]) for name in self.energies}
            return Joint(per_datum, rest, state, jax.lax.stop_gradient(potentials))

        if self.latents:
            joint = jax.vmap(one)(local, shared)
        else:
            joint = jax.tree.map(lambda x: x[None], one({}, {}))
        first = jax.tree.map(lambda x: x[0], joint.mutable)
        return joint._replace(mutable=first)

    def log_base(self, params: Params, local: Sites, shared: Sites, batch: Batch) -> tuple[Array, Array]:
        """Return log densities ``([N, B] per datum, [N] rest)`` of what :meth:`draw_latents` draws.

        In unconstrained space: that is the latents' priors, normalised, with the bases of energy priors; scales and
        masks are left out.
        """

        def one(local: Sites, shared: Sites) -> tuple[Array, Array]:
            trace, log_det = self.trace(params, local, shared, batch)
            per_datum, rest = jnp.zeros((self.width(batch),)), jnp.zeros(())
            for name in self.latents:
                site = {**trace[name], "fn": unmasked(trace[name]["fn"]), "scale": None}
                with base_only():
                    value = site_log_prob(site, log_det.get(name), jnp.zeros(()))
                if self.is_local(site):
                    per_datum += self.by_datum(value, site).sum(-1)
                else:
                    rest += value.sum()
            return per_datum, rest

        return jax.vmap(one)(local, shared)

    def energy_positions(self, params: Params, local: Sites, shared: Sites, batch: Batch) -> dict[str, Array]:
        """Return where particles, or data, stand at every energy prior that is not conditional: ``[n, *event]``.

        ``[n, D, *event]`` at a prior of D elements, see :meth:`.EnergyPrior.as_walkers`.
        """

        def one(local: Sites, shared: Sites) -> dict[str, Array]:
            trace, _ = self.trace(params, local, shared, batch)
            result = {}
            for name, site in self.energies.items():
                if not site.per_datum:
                    result[name] = unwrap(trace[name]["fn"]).as_walkers(trace[name]["value"])
            return result

        if not self.latents:
            return one({}, {})
        flat = lambda x: x.reshape((-1, *x.shape[2:]))
        return jax.tree.map(flat, jax.vmap(one)(local, shared))

    def lowest(self, params: Params, local: Sites, shared: Sites, batch: Batch) -> dict[str, Array]:
        """Return the least log density of each sample site of one particle, ``[B]`` or a scalar; else −inf."""
        trace, log_det = self.trace(params, local, shared, batch)
        result = {}
        for name, site in trace.items():
            if site["type"] != "sample":
                continue
            value = site_log_prob(site, log_det.get(name), jnp.zeros(()))
            value = jnp.where(jnp.isfinite(value), value, -jnp.inf)
            value = self.by_datum(value, site) if self.is_local(site) else value.ravel()
            result[name] = value.min(-1, initial=jnp.inf)
        return result

    def tilted(self, params: Params, batch: Batch) -> dict[str, TiltedDensity]:
        """Return every energy prior as base and energy over unconstrained walkers, at these parameters."""
        return {name: prior.tilted() for name, prior in self.energy_priors(params, batch).items()}

    def energy_priors(self, params: Params, batch: Batch) -> dict[str, EnergyPrior]:
        """Return the model's ``EnergyPrior`` objects, which depend on no latent."""
        if not self.energies:
            return {}
        trace, _ = self.trace(params, {}, {}, batch)
        return {name: unwrap(trace[name]["fn"]) for name in self.energies}

    def sites(self, params: Params, batch: Batch) -> dict[str, dict[str, Any]]:
        """Return the sample sites, with latents drawn from the prior (bases of energy priors)."""
        trace, _ = self.trace(params, {}, {}, batch)
        return {name: site for name, site in trace.items() if site["type"] == "sample"}

    def means(
        self, params: Params, local: Sites, shared: Sites, batch: Batch, sites: Sequence[str]
    ) -> dict[str, Array]:
        """Return means of the distributions at ``sites`` given one particle, in the sites' full shapes."""
        trace, _ = self.trace(params, local, shared, batch)
        fns = {name: trace[name]["fn"] for name in sites}
        return {name: jnp.broadcast_to(fn.mean, fn.shape()) for name, fn in fns.items()}

    def expected(
        self, params: Params, local: Sites, shared: Sites, batch: Batch, sites: Sequence[str]
    ) -> dict[str, Array]:
        """Return :meth:`values` of N particles at ``sites``, and at observed ones :meth:`means`: ``[N, ...]``."""

        def one(local: Sites, shared: Sites) -> dict[str, Array]:
            trace, _ = self.trace(params, local, shared, batch)
            observed = {name for name in sites if trace[name]["type"] == "sample" and name not in self.latents}
            mean = lambda fn: jnp.broadcast_to(fn.mean, fn.shape())
            return {name: mean(trace[name]["fn"]) if name in observed else trace[name]["value"] for name in sites}

        return jax.vmap(one)(local, shared)

    def proper(self) -> "LatentModel":
        """Return the model with masks taken off its latents, whose prior is then proper.

        A new object each time: under jit to be called inside.
        """
        return replace(self, model=unmask_latents(self.model))

    # --- latents --------------------------------------------------------------------------------------

    def draw_latents(self, params: Params, batch: Batch, known: Sites | None = None) -> tuple[Sites, Sites]:
        """Draw one unconstrained particle ``(local {site: [B, ...]}, global)`` from the prior.

        Energy priors give a draw of their base; improper priors a uniform draw from (−2, 2). ``known`` are
        global latents to draw the local ones from.
        """
        return self._unconstrained(self.trace(params, {}, known or {}, batch)[0])

    def _unconstrained(self, trace: dict[str, Any]) -> tuple[Sites, Sites]:
        """Return the latents of a trace, as :meth:`draw_latents` does."""
        local, shared = {}, {}
        for name, site in self.latents.items():
            fn, value = trace[name]["fn"], trace[name]["value"]
            u = biject_to(fn.support).inv(value)
            if site.local:
                local[name] = jnp.moveaxis(u, u.ndim + site.axis, 0)
            else:
                shared[name] = u
        return local, shared

    def unconstrain(self, params: Params, values: dict[str, Array], batch: Batch) -> tuple[Sites, Sites]:
        """Return one particle at constrained values of some latents; the others are drawn as in :meth:`draw_latents`.

        Raises:
            ModelError: naming a latent whose value has another shape.
        """
        placed = place_constrained(self._bound(params, batch), values)
        return self._unconstrained(trace_model(from_base(placed), *join_static(batch.data, self.static_arguments)))

    def values(
        self, params: Params, local: Sites, shared: Sites, batch: Batch, sites: Sequence[str]
    ) -> dict[str, Array]:
        """Return constrained values of N particles at ``sites`` (latent or deterministic): ``[N, ...]``."""

        def one(local: Sites, shared: Sites) -> dict[str, Array]:
            trace, _ = self.trace(params, local, shared, batch)
            return {name: trace[name]["value"] for name in sites}

        return jax.vmap(one)(local, shared)

    def simulate(self, params: Params, batch: Batch) -> tuple[Sites, Sites, dict[str, Array]]:
        """Draw ``(local, global, {observed site: value})`` from the model, unconstrained latents.

        Energy priors give a draw of an annealed population, see :meth:`.EnergyPrior.sample`.
        """
        model = handlers.uncondition(self._bound(params, batch))
        trace = trace_model(model, *join_static(batch.data, self.static_arguments))
        local, shared = self._unconstrained(trace)
        sites = {name: site["value"] for name, site in trace.items() if site["type"] == "sample"}
        values = {name: v for name, v in sites.items() if name not in self.latents}
        return local, shared, values

    # --- running the model ----------------------------------------------------------------------------

    def width(self, batch: Batch) -> int:
        """Return the number of data visited."""
        return self.batch_size if batch.indices is None else batch.indices.shape[0]

    def ratio(self, batch: Batch) -> float:
        """Return the scale that the data plate puts on its sites."""
        return self.num_data / self.width(batch)

    def blocks(self, wanted: np.ndarray | None = None, joint: bool = True) -> Array | list[None]:
        """Return data to work off at a time: ``[K, B]`` indices, or one None without subsampling.

        The last block is filled up with data from the front.

        Args:
            wanted: indices, by default of all data. If there are fewer than B, they are one block.
            joint: whether global latents, which couple the data, make one block of all.
        """
        if not self.subsampled:
            return [None]
        if joint and self.global_sites:
            return jnp.arange(self.num_data, dtype=jnp.int32)[None]
        return split_indices(self.num_data, self.batch_size, wanted)

    def map_blocks(
        self,
        function: Callable[[Batch], Any],
        batch: Batch,
        axes: Any,
        wanted: np.ndarray | None = None,
        joint: bool = True,
        progress: Progress = silent,
    ) -> Any:
        """Apply a function to one block of data after the other, and join what it returns.

        Args:
            function: batch -> tree of arrays.
            batch: what all blocks see, but for their ``indices`` and keys; see :func:`.map_blocks`.
            axes: a prefix of that tree: the axis that runs over the data; None for what all blocks agree on, of which
                the first is kept; ``BY_BLOCK`` for one value of each block, which are stacked.
            wanted: see :meth:`blocks`.
            joint: see :meth:`blocks`.
            progress: told how many blocks are done, of how many.
        """
        in_order = self.subsampled and not (joint and self.global_sites)  # blocks hold what is wanted, in its order
        number = self.num_data if wanted is None else len(wanted)
        chosen: Any = slice(number) if in_order else wanted
        return map_blocks(function, batch, self.blocks(wanted, joint), axes, chosen, progress)

    def is_local(self, site: dict[str, Any]) -> bool:
        """Return whether a site lies in the data plate."""
        return self.plate is not None and self.plate.holds(site)

    def by_datum(self, value: Array, site: dict[str, Any]) -> Array:
        """Return ``[B, n]`` from an array in the batch shape of a local site."""
        assert self.plate is not None, "without a plate no site is local"
        return self.plate.by_datum(value, site)

    def trace(
        self, params: Params, local: Sites, shared: Sites, batch: Batch
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return the model's trace with one particle in place, and its Jacobian terms by site.

        Sites that the particle lacks are drawn as :meth:`draw_latents` says.
        """
        particle = dict(shared)
        for name, value in local.items():
            particle[name] = jnp.moveaxis(value, 0, self.latents[name].axis)
        placed = place(self._bound(params, batch), particle)
        trace = trace_model(from_base(placed), *join_static(batch.data, self.static_arguments))
        return trace, placed.log_det

    def _bound(self, params: Params, batch: Batch) -> Callable:
        """Return the model with parameters, mutable state and the minibatch put in, and a key to draw from."""
        values = {**params, **copy_containers(batch.mutable)}
        if batch.indices is not None and self.plate is not None:
            values[self.plate.name] = batch.indices
        return handlers.seed(handlers.substitute(self.model, data=values), batch.rng_key)


def _unconstrained(model: LatentModel, params: Params) -> Params:
    return {name: model.param_transforms[name].inv(value) for name, value in params.items()}
