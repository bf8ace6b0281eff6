"""The model on the data whose latents were collected."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.model.values import SiteLayout
from numpyro_ebipla.results.sites import trace_sites
from numpyro_ebipla.training.fitted import Fitted


class Visiting(Messenger):
    """The model on the data whose latents were collected, in their order.

    A subsampled plate gets their indices, or all of a plate of another size. Where the plate is not
    subsampled the model cannot be told which data to visit: then latents of data that were not collected
    become NaN, and so does what is computed from them.
    """

    def __init__(
        self, fn: Callable, model: LatentModel, layout: dict[str, SiteLayout], indices: np.ndarray | None
    ) -> None:
        super().__init__(fn)
        self.plate, self.subsampled, self.num_data = model.plate, model.subsampled, model.num_data
        self.indices = indices
        self.axes = {name: layout[name].axis for name in model.latents if name in layout}

    def process_message(self, msg: dict[str, Any]) -> None:
        """Give a plate the collected data to visit."""
        if msg["type"] != "plate" or self.plate is None or msg["name"] != self.plate.name:
            return
        size, batch = msg["args"]
        if batch is None or batch == size:
            return
        collected = self.indices is not None and size == self.plate.size
        with jax.ensure_compile_time_eval():  # so that models may index NumPy arrays with it
            msg["value"] = jnp.asarray(self.indices if collected else np.arange(size), jnp.int32)
        msg["args"] = (size, msg["value"].shape[0])

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Spread a latent of some data over all of them."""
        if self.indices is None or self.subsampled or msg["type"] != "sample":
            return
        axis = self.axes.get(msg["name"])
        if axis is not None and jnp.shape(msg["value"])[axis] == len(self.indices):
            msg["value"] = spread(msg["value"], axis, self.indices, self.num_data)


F = TypeVar("F", bound=Fitted)


def bind_model(fit: F) -> F:
    """Return the fit with its parameters put into its model, which visits the data collected."""
    own = fit.model.fn.fn if isinstance(fit.model, Visiting) else fit.model
    fitted = handlers.substitute(own, data={**fit.params, **fit.state.mutable})
    return replace(fit, model=Visiting(fitted, fit.config.model, fit.layout, fit.plan.indices))


def on_collected(fit: F) -> F:
    """Return the fit, its model bound, as it comes from collecting."""
    return _cut_deterministic(bind_model(fit))


def _cut_deterministic(fit: F) -> F:
    """Cut deterministic sites to the chosen data where the latents are, so that all axes of the plate agree.

    A plate that is not subsampled computes them for all data.
    """
    model, indices = fit.config.model, fit.plan.indices
    cut = [name for name in model.latents if name in fit.layout and fit.layout[name].axis is not None]
    if fit.draws is None or indices is None or model.subsampled or not cut:
        return fit
    sites, _ = trace_sites(fit, np.asarray(indices), {}, values=False)
    samples, layout, plate = dict(fit.draws.samples), dict(fit.layout), fit.plate_name
    for name, value in samples.items():
        if name in model.latents or plate not in sites[name].dims:
            continue
        axis = sites[name].dims.index(plate) - len(sites[name].dims)
        samples[name] = np.take(value, indices, axis)
        layout[name] = layout[name]._replace(axis=axis)
    return replace(fit, draws=fit.draws._replace(samples=samples), layout=layout)


def spread(value: Any, axis: int, indices: np.ndarray, size: int) -> Any:
    """Return ``value`` at ``indices`` of an axis of length ``size``, NaN elsewhere."""
    value = jnp.moveaxis(jnp.asarray(value), axis, 0)
    full = jnp.full((size, *value.shape[1:]), jnp.nan, value.dtype)
    return jnp.moveaxis(full.at[np.asarray(indices)].set(value), 0, axis)
