"""Missing values: NaN in the data, taken out of the density element by element."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.primitives import Messenger

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.validate import as_site_names
from numpyro_ebipla.model.energy import unwrap


class nan_masked(Messenger):
    """The model with NaN at its observed sites as missing values.

    Each missing element is taken out of the log density, so what is left is the density of the others: missing at
    random (Rubin, 1976). This needs elements that are independent given the latents: univariate distributions, also
    under ``.to_event()``. Others (``MultivariateNormal``) are refused, as they would have to be marginalised.

    It is not imputation: nothing is put in the place of the missing. :meth:`.EBIPLA.reconstruct` gives their posterior
    means. NaN that the model puts to other use (as a covariate) stays NaN, and is met with an error at the start.
    NumPyro's own ``obs_mask=`` is the alternative, which makes a latent site ``<site>_unobserved`` for them.

    Args:
        model: a NumPyro model; what is returned is one, too.
        sites: observed sites that may have missing values, by default all.

    Raises:
        ModelError: naming a site whose elements are not independent, when the model is first run.

    >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
    >>> from jax import random
    >>> from numpyro_ebipla import EBIPLA
    >>> def model(y):
    ...     with numpyro.plate("data", len(y)):
    ...         x = numpyro.sample("x", dist.Normal(0, 1))
    ...         numpyro.sample("y", dist.Normal(x[:, None] * jnp.ones(2), 1).to_event(1), obs=y)
    >>> y = jnp.array([[2.0, jnp.nan], [jnp.nan, jnp.nan]])
    >>> mean = EBIPLA(nan_masked(model)).reconstruct(random.key(0), {}, y)["y"]
    >>> bool(jnp.abs(mean - jnp.array([[1.0], [0.0]])).max() < 0.2)
    True
    """

    def __init__(self, model: Callable, sites: Sequence[str] | None = None) -> None:
        if not callable(model):
            raise TypeError(
                f"nan_masked: model must be a function with NumPyro primitives, got {type(model).__name__}."
            )
        super().__init__(model)
        self.sites = None if sites is None else as_site_names("nan_masked: sites", sites)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Mask an observed site."""
        if msg["type"] != "sample" or not msg["is_observed"] or isinstance(unwrap(msg["fn"]), dist.Unit):
            return
        value = msg["value"]
        chosen = self.sites is None or msg["name"] in self.sites
        if not chosen or not jnp.issubdtype(jnp.result_type(value), jnp.inexact):  # integers cannot be missing
            return
        value, fn = jnp.asarray(value), msg["fn"]
        missing = jnp.broadcast_to(jnp.isnan(value), fn.shape())
        masked = _masked(fn, ~missing)
        if masked is None:
            raise ModelError(
                f"nan_masked: the elements of '{msg['name']}' are not independent under {type(fn).__name__}, so "
                "missing ones cannot be left out one by one: use a univariate distribution with .to_event(), or leave "
                "this site out of sites=[…]."
            )
        msg["fn"], msg["value"] = masked, jnp.where(jnp.isnan(value), _harmless(fn), value)


def _masked(fn: Any, observed: Array) -> Any:
    """Return ``fn`` masked by element (``observed`` has its whole shape), or None."""
    if fn.event_dim == 0:
        return fn.mask(observed)
    if isinstance(fn, dist.MaskedDistribution):
        inner = _masked(fn.base_dist, observed)
        return inner and inner.mask(fn._mask)
    if isinstance(fn, dist.ExpandedDistribution) and isinstance(fn.base_dist, dist.Independent):
        inside = fn.base_dist
        num = inside.reinterpreted_batch_ndims
        base_shape = inside.base_dist.batch_shape
        wide = inside.base_dist.expand(fn.batch_shape + base_shape[len(base_shape) - num :])
        return _masked(wide.to_event(num), observed)
    if isinstance(fn, dist.Independent):
        inner = _masked(fn.base_dist, observed)
        return inner and inner.to_event(fn.reinterpreted_batch_ndims)
    return None


def _harmless(fn: Any) -> Array | float:
    """Return a value inside the support, to stand for what is missing: its gradient must be finite."""
    while isinstance(fn, dist.MaskedDistribution | dist.ExpandedDistribution | dist.Independent):
        fn = fn.base_dist
    try:
        value = fn.support.feasible_like(jnp.zeros(()))
    except (NotImplementedError, AttributeError):
        return 0.0
    return jnp.where(jnp.isfinite(value), value, 0.0)
