"""A NumPyro model as pure functions of (parameters, latents, minibatch).

:func:`inspect_model` looks once at the model, refuses what cannot be fitted, and returns a
:class:`LatentModel`. Its methods run the model under handlers that put unconstrained particles at the latent
sites; a data plate's M/B scale is divided out again, so that what belongs to one datum is never rescaled.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, random
from numpyro import handlers
from numpyro.distributions.transforms import biject_to
from numpyro.distributions.util import sum_rightmost
from numpyro.primitives import Messenger

from numpyro_ebipla._static import join_static
from numpyro_ebipla._types import Latents, Params
from numpyro_ebipla.anneal import TiltedDensity
from numpyro_ebipla.energy import EnergyPrior, log_normaliser, unwrap


class LatentSite(NamedTuple):
    """A latent sample site.

    Attributes:
        local: whether it lies inside the data plate.
        axis: axis of the data plate in the unconstrained value, counted from the right (local sites).
        value_axis: the same in the constrained value.
        plates: names of its plates by dimension of the constrained value, outermost first.
    """

    local: bool
    axis: int
    value_axis: int
    plates: tuple[str | None, ...]


class EnergySite(NamedTuple):
    """An energy prior: whether it is observed, and whether every datum has a normaliser of its own."""

    observed: bool
    per_datum: bool


class DataPlate(NamedTuple):
    """The plate whose elements are the data: its name, ``M``, ``B`` and dimension (from the right)."""

    name: str
    size: int
    batch_size: int
    dim: int


class Joint(NamedTuple):
    """Log densities of N particles and what comes with them.

    Attributes:
        per_datum: ``[N, B]`` the sum of all sites inside the data plate, for each datum.
        rest: ``[N]`` the sum of all others.
        mutable: new values at ``mutable`` sites, of the first particle.
        energies: ``{energy site: mean energy}`` at the particles (the data, if it is observed).
    """

    per_datum: Array
    rest: Array
    mutable: dict[str, Any]
    energies: dict[str, Array]


@dataclass(frozen=True)
class LatentModel:
    """The model with its layout; see :func:`inspect_model`.

    ``data`` below are the array arguments of the model and ``indices`` the ``[B]`` data to visit, None for all
    of a plate that is not subsampled. ``params`` are constrained except in :meth:`constrain_params`.
    """

    model: Callable
    static_arguments: Any
    param_transforms: dict[str, Any]
    latents: dict[str, LatentSite]
    energies: dict[str, EnergySite]
    plate: DataPlate | None

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

    def constrain_params(self, unconstrained: Params) -> Params:
        """Parameters in the space that the model declares."""
        return {
            name: self.param_transforms[name](value) if name in self.param_transforms else value
            for name, value in unconstrained.items()
        }

    def unconstrain_params(self, params: Params) -> Params:
        """The inverse of :meth:`constrain_params`."""
        return {
            name: self.param_transforms[name].inv(value) if name in self.param_transforms else value
            for name, value in params.items()
        }

    # --- densities ------------------------------------------------------------------------------------

    def log_joint(
        self,
        params: Params,
        local: Latents,
        glob: Latents,
        indices: Array | None,
        data: Any,
        rng_key: Array,
        mutable: dict[str, Any],
        log_z: dict[str, Array],
    ) -> "Joint":
        """Log densities of N particles, in unconstrained space (Jacobians included).

        Args:
            params: constrained parameters.
            local: ``{site: [N, B, *event]}``.
            glob: ``{site: [N, *event]}``.
            indices: see the class.
            data: see the class.
            rng_key: for models that ask for one.
            mutable: values at ``mutable`` sites.
            log_z: ``{energy site: log normaliser}``, broadcasting to its batch shape; zero if missing.
        """

        def one(local: Latents, glob: Latents) -> Joint:
            trace, log_det = self._run(params, local, glob, indices, data, rng_key, mutable)
            per_datum = jnp.zeros((self._width(indices),))
            rest = jnp.zeros(())
            for name, site in trace.items():
                if site["type"] != "sample":
                    continue
                value = _site_log_prob(site, log_det.get(name), log_z.get(name, jnp.zeros(())))
                if self._is_local(site):
                    by_datum = jnp.moveaxis(value / self._ratio(indices), self.plate.dim, 0)
                    per_datum += by_datum.reshape(by_datum.shape[0], -1).sum(-1)
                else:
                    rest += value.sum()
            state = {name: trace[name]["value"] for name in mutable}
            energies = {name: unwrap(trace[name]["fn"]).energy(trace[name]["value"]).mean() for name in self.energies}
            return Joint(per_datum, rest, state, jax.lax.stop_gradient(energies))

        if self.latents:
            joint = jax.vmap(one)(local, glob)
        else:
            joint = jax.tree.map(lambda x: x[None], one({}, {}))
        first = jax.tree.map(lambda x: x[0], joint.mutable)
        return joint._replace(mutable=first, energies=jax.tree.map(jnp.mean, joint.energies))

    def faults(
        self, params: Params, local: Latents, glob: Latents, indices: Any, data: Any, key: Array, mutable: Any
    ) -> dict[str, Array]:
        """Where the log density of each sample site is not finite, for one particle: ``[B]``, or a scalar."""
        trace, log_det = self._run(params, local, glob, indices, data, key, mutable)
        result = {}
        for name, site in trace.items():
            if site["type"] != "sample":
                continue
            bad = ~jnp.isfinite(_site_log_prob(site, log_det.get(name), jnp.zeros(())))
            if self._is_local(site):
                bad = jnp.moveaxis(bad, self.plate.dim, 0)
                result[name] = bad.reshape(bad.shape[0], -1).any(-1)
            else:
                result[name] = bad.any()
        return result

    def tilted(
        self, params: Params, indices: Array | None, data: Any, rng_key: Array, mutable: dict[str, Any]
    ) -> dict[str, TiltedDensity]:
        """Every energy prior as base and energy over unconstrained walkers, at these parameters."""
        priors = self.energy_priors(params, indices, data, rng_key, mutable)
        return {name: prior.tilted() for name, prior in priors.items()}

    def energy_priors(
        self, params: Params, indices: Array | None, data: Any, rng_key: Array, mutable: dict[str, Any]
    ) -> dict[str, EnergyPrior]:
        """The model's ``EnergyPrior`` objects; they depend on no latent, so any will do to get at them."""
        if not self.energies:
            return {}
        model = _from_base(self._bound(params, indices, data, rng_key, mutable))
        trace = _trace(model, *join_static(data, self.static_arguments))
        return {name: unwrap(trace[name]["fn"]) for name in self.energies}

    # --- latents --------------------------------------------------------------------------------------

    def draw_latents(
        self,
        rng_key: Array,
        params: Params,
        indices: Array | None,
        data: Any,
        mutable: dict[str, Any],
        known: Latents | None = None,
    ) -> tuple[Latents, Latents]:
        """One unconstrained particle ``(local {site: [B, ...]}, global)`` from the prior.

        Energy priors give a draw of their base; improper priors a uniform draw from (−2, 2). ``known`` are
        global latents to draw the local ones from.
        """
        model = _from_base(_Place(self._bound(params, indices, data, rng_key, mutable), known or {}))
        trace = _trace(model, *join_static(data, self.static_arguments))
        local, glob = {}, {}
        for name, site in self.latents.items():
            fn, value = trace[name]["fn"], trace[name]["value"]
            u = biject_to(fn.support).inv(value)
            if site.local:
                local[name] = jnp.moveaxis(u, u.ndim + site.axis, 0)
            else:
                glob[name] = u
        return local, glob

    def values(
        self,
        params: Params,
        local: Latents,
        glob: Latents,
        indices: Array | None,
        data: Any,
        rng_key: Array,
        mutable: dict[str, Any],
        sites: Sequence[str],
    ) -> dict[str, Array]:
        """Constrained values of N particles at ``sites`` (latent or deterministic): ``[N, ...]``."""

        def one(local: Latents, glob: Latents) -> dict[str, Array]:
            trace, _ = self._run(params, local, glob, indices, data, rng_key, mutable)
            return {name: trace[name]["value"] for name in sites}

        return jax.vmap(one)(local, glob)

    # --- running the model ----------------------------------------------------------------------------

    def _width(self, indices: Array | None) -> int:
        return self.batch_size if indices is None else indices.shape[0]

    def _ratio(self, indices: Array | None) -> float:
        """The scale that the data plate puts on its sites."""
        return self.num_data / self._width(indices)

    def _is_local(self, site: dict[str, Any]) -> bool:
        return self.plate is not None and any(frame.name == self.plate.name for frame in site["cond_indep_stack"])

    def _bound(
        self, params: Params, indices: Array | None, data: Any, rng_key: Array, mutable: dict[str, Any]
    ) -> Callable:
        """The model with parameters, mutable state and the minibatch put in, and a key to draw from."""
        values = {**params, **_copy(mutable)}
        if indices is not None and self.plate is not None:
            values[self.plate.name] = indices
        return handlers.seed(handlers.substitute(self.model, data=values), rng_key)

    def _run(
        self,
        params: Params,
        local: Latents,
        glob: Latents,
        indices: Array | None,
        data: Any,
        rng_key: Array,
        mutable: dict[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Trace of the model with one particle in place, and its Jacobian terms by site."""
        particle = dict(glob)
        for name, value in local.items():
            particle[name] = jnp.moveaxis(value, 0, self.latents[name].axis)
        placed = _Place(self._bound(params, indices, data, rng_key, mutable), particle)
        trace = _trace(_from_base(placed), *join_static(data, self.static_arguments))
        return trace, placed.log_det


def _trace(model: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The model's trace; a plate filled with all its data is no reason to warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="subsample_size does not match")
        return handlers.trace(model).get_trace(*args, **kwargs)


def _site_log_prob(site: dict[str, Any], log_det: Array | None, log_z: Array) -> Array:
    """Scaled log density at a site, in its full batch shape."""
    fn, value = site["fn"], site["value"]
    with log_normaliser(log_z):
        if site.get("intermediates"):
            log_prob = fn.log_prob(value, site["intermediates"])
        else:
            log_prob = fn.log_prob(value)
    if log_det is not None:
        log_prob = log_prob + sum_rightmost(log_det, log_det.ndim - jnp.ndim(value) + fn.event_dim)
    if site["scale"] is not None:
        log_prob = log_prob * site["scale"]
    return jnp.broadcast_to(log_prob, jnp.broadcast_shapes(jnp.shape(log_prob), fn.batch_shape))


def _copy(tree: Any) -> Any:
    """New containers, as modules with mutable state write into theirs."""
    return jax.tree.map(lambda x: x, tree)


class _Place(Messenger):
    """Put unconstrained values at latent sites, through the bijection to each site's support.

    The support is that of the distribution met on this run: it may depend on parameters and other latents.
    """

    def __init__(self, fn: Callable, latents: Latents) -> None:
        super().__init__(fn)
        self.latents = latents
        self.log_det: dict[str, Array] = {}

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or msg["name"] not in self.latents:
            return
        u = self.latents[msg["name"]]
        transform = biject_to(msg["fn"].support)
        msg["value"] = transform(u)
        self.log_det[msg["name"]] = transform.log_abs_det_jacobian(u, msg["value"])


class _from_base(Messenger):
    """Where a latent has no value yet, draw from an energy prior's base, or spread over improper supports."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or msg["value"] is not None or msg["is_observed"]:
            return
        fn, key = msg["fn"], msg["kwargs"].get("rng_key")
        prior = unwrap(fn)
        shape = msg["kwargs"].get("sample_shape", ()) + fn.batch_shape
        if isinstance(prior, EnergyPrior):
            base = prior.base
            extra = shape[: len(shape) - len(base.batch_shape)] if shape else ()
            try:
                msg["value"] = base.expand(shape).sample(key) if shape else base.sample(key)
            except ValueError:  # batch shapes that do not nest
                msg["value"] = base.sample(key, extra)
            return
        try:
            msg["value"] = fn.sample(key, msg["kwargs"].get("sample_shape", ()))
        except NotImplementedError:
            transform = biject_to(fn.support)
            free = transform.inverse_shape(shape + fn.event_shape)
            msg["value"] = transform(random.uniform(key, free, minval=-2.0, maxval=2.0))
