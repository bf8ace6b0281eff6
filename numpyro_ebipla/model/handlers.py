"""Effect handlers by which a model is run: particles at its latent sites, draws from bases, log densities by site."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, random
from numpyro import handlers
from numpyro.distributions.transforms import biject_to
from numpyro.distributions.util import sum_rightmost
from numpyro.ops.pytree import PytreeTrace
from numpyro.primitives import Messenger

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Params, Sites
from numpyro_ebipla.model.energy import EnergyPrior, subtracting, unwrap


def trace_model(model: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Return the model's trace; a plate filled with all its data is not worth a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="subsample_size does not match")
        return handlers.trace(model).get_trace(*args, **kwargs)


def site_log_prob(site: dict[str, Any], log_det: Array | None, log_z: Array) -> Array:
    """Return the scaled log density at a site, in its full batch shape."""
    fn, value = site["fn"], site["value"]
    with subtracting(log_z):
        if site.get("intermediates"):
            log_prob = fn.log_prob(value, site["intermediates"])
        else:
            log_prob = fn.log_prob(value)
    if log_det is not None:
        log_prob = log_prob + sum_rightmost(log_det, log_det.ndim - jnp.ndim(value) + fn.event_dim)
    if site["scale"] is not None:
        log_prob = log_prob * site["scale"]
    return jnp.broadcast_to(log_prob, jnp.broadcast_shapes(jnp.shape(log_prob), fn.batch_shape))


def copy_containers(tree: Any) -> Any:
    """Return the tree in new containers, as modules with mutable state write into theirs."""
    return jax.tree.map(lambda x: x, tree)


def unmasked(fn: Any) -> Any:
    """Return the distribution inside masks."""
    while isinstance(fn, dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


class place(Messenger):
    """Put unconstrained values at latent sites, through the bijection to each site's support.

    The support is that of the distribution met on this run: it may depend on parameters and other latents.
    """

    def __init__(self, fn: Callable, latents: Sites) -> None:
        super().__init__(fn)
        self.latents = latents
        self.log_det: dict[str, Array] = {}

    def process_message(self, msg: dict[str, Any]) -> None:
        """Put a value."""
        if msg["type"] != "sample" or msg["name"] not in self.latents:
            return
        u = self.latents[msg["name"]]
        transform = biject_to(msg["fn"].support)
        msg["value"] = transform(u)
        self.log_det[msg["name"]] = transform.log_abs_det_jacobian(u, msg["value"])


class hold_params(Messenger):
    """Give parameters values, and hide them: what is outside sees constants."""

    def __init__(self, fn: Callable, held: Params) -> None:
        super().__init__(fn)
        self.held = held

    def process_message(self, msg: dict[str, Any]) -> None:
        """Put a value."""
        if msg["type"] == "param" and msg["name"] in self.held:
            msg["value"], msg["stop"] = copy_containers(self.held[msg["name"]]), True


class check_substituted(Messenger):
    """Raise for parameters with a value from ``handlers.substitute``: SVI would train them all the same.

    Raises:
        ModelError: naming the parameter.
    """

    def process_message(self, msg: dict[str, Any]) -> None:
        """Look at a parameter."""
        if msg["type"] == "param" and msg["value"] is not None:
            name = msg["name"]
            raise ModelError(
                f"parameter '{name}' has a value from numpyro.handlers.substitute, which does not hold it: it would be "
                f"trained from there. Take the handler off, and pass EBIPLA(model, hold={{'{name}': value}}) to hold "
                f"it, or run(init_params={{'{name}': value}}) to start there."
            )


class place_constrained(Messenger):
    """Put values at latent sites as they are.

    Raises:
        ModelError: naming a site whose values have another shape.
    """

    def __init__(self, fn: Callable, values: dict[str, Array]) -> None:
        super().__init__(fn)
        self.values = values

    def process_message(self, msg: dict[str, Any]) -> None:
        """Put a value."""
        if msg["type"] != "sample" or msg["name"] not in self.values:
            return
        value, shape = self.values[msg["name"]], msg["fn"].shape(msg["kwargs"].get("sample_shape", ()))
        if jnp.shape(value) != shape:
            raise ModelError(
                f"guide: draws of '{msg['name']}' have shape {jnp.shape(value)}, but its values in "
                f"the model have {shape}."
            )
        msg["value"] = value


class from_base(Messenger):
    """Draw latents without a value from an energy prior's base, or spread them over improper supports."""

    def process_message(self, msg: dict[str, Any]) -> None:
        """Draw a value."""
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


class check_names(Messenger):
    """Raise for a name that two sites share: one would hide the other, or NumPyro's error would not say what they are.

    Raises:
        ModelError: naming them.
    """

    #: What has a name, and what it is called.
    KINDS = {
        "sample": "sample site",
        "deterministic": "deterministic site",
        "param": "parameter",
        "plate": "plate",
        "mutable": "mutable value",
    }
    ONCE = ("sample", "deterministic")

    def __enter__(self) -> Any:
        self.known: dict[str, str] = {}
        return super().__enter__()

    def process_message(self, msg: dict[str, Any]) -> None:
        """Look at a name."""
        kind, name = msg["type"], msg.get("name", "")
        if kind not in self.KINDS:
            return
        before = self.known.get(name)
        self.known[name] = kind
        if before is not None and (before != kind or kind in self.ONCE):
            one, other = self.KINDS[before], self.KINDS[kind]
            raise ModelError(
                f"'{name}' is the name of a {one} and of a{'nother' if one == other else ''} {other}: rename one."
            )


class check_plates(Messenger):
    """Raise for sizes that a plate cannot have: NumPyro goes on with them, or fails without the plate's name.

    Raises:
        ModelError: naming the plate.
    """

    def __enter__(self) -> Any:
        self.sizes: dict[str, Any] = {}
        return super().__enter__()

    def process_message(self, msg: dict[str, Any]) -> None:
        """Look at a plate."""
        if msg["type"] != "plate":
            return
        name, (size, batch) = msg["name"], msg["args"]
        if self.sizes.setdefault(name, (size, batch)) != (size, batch):
            raise ModelError(
                f"plate '{name}' has {size} elements, and {self.sizes[name][0]} elsewhere (or another subsample_size): "
                "plates of one name are one plate, so give it another."
            )
        if batch is not None and (type(batch) is bool or not isinstance(batch, int | np.integer) or batch < 1):
            raise ModelError(f"plate '{name}' has subsample_size {batch!r}; it must be an integer of at least 1.")
        if batch is not None and batch > size:
            raise ModelError(f"plate '{name}' has subsample_size {batch}, above its {size} data: lower the batch size.")


class check_loops(Messenger):
    """Raise for latents inside ``scan`` and ``cond`` of NumPyro: their bodies run where no particle can be placed.

    Raises:
        ModelError: naming the latent.
    """

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Look into a loop."""
        if msg["type"] != "control_flow":
            return
        traces = [x for x in jax.tree.leaves(msg["value"], is_leaf=_is_trace) if _is_trace(x)]
        for site in (site for trace in traces for site in trace.trace.values()):
            if site["type"] == "sample" and not site["is_observed"]:
                raise ModelError(
                    f"latent site '{site['name']}' is inside numpyro.contrib.control_flow.scan or cond, where "
                    "particles cannot be placed: draw it before, in a plate over the steps, and scan over its values, "
                    "or write a Python loop."
                )


def _is_trace(x: Any) -> bool:
    return isinstance(x, PytreeTrace)


class unmask_latents(Messenger):
    """Give latents their whole prior where a mask hides it: what the model says nothing of integrates to one.

    So it is for the elements of ``<site>_unobserved`` that ``obs_mask`` calls observed, and for padded data.
    """

    def process_message(self, msg: dict[str, Any]) -> None:
        """Take a mask off."""
        if msg["type"] == "sample" and not msg["is_observed"]:
            msg["fn"] = _without_masks(msg["fn"])


def _without_masks(fn: Any) -> Any:
    if isinstance(fn, dist.MaskedDistribution):
        return _without_masks(fn.base_dist)
    if not isinstance(fn, dist.ExpandedDistribution | dist.Independent):
        return fn
    inner = _without_masks(fn.base_dist)
    if inner is fn.base_dist:
        return fn
    if isinstance(fn, dist.Independent):
        return inner.to_event(fn.reinterpreted_batch_ndims)
    return inner.expand(fn.batch_shape)


def simulated(site: dict[str, Any]) -> bool:
    """Return whether an observed site can be redrawn; ``numpyro.factor`` cannot."""
    return bool(site["is_observed"]) and not isinstance(unwrap(site["fn"]), dist.Unit)
