"""Draws of a NumPyro guide, whose parameters are known."""

from collections.abc import Callable
from typing import Any

from jax import Array
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Params
from numpyro_ebipla._core.static import join_static
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.handlers import trace_model
from numpyro_ebipla.model.latent_model import LatentModel


class known_params(Messenger):
    """Raise for parameters that would fall back to their initial values.

    Raises:
        ModelError: naming the parameter.
    """

    def process_message(self, msg: dict[str, Any]) -> None:
        """Look at a parameter."""
        if msg["type"] == "param" and msg["value"] is None:
            raise ModelError(
                f"guide: its parameter '{msg['name']}' has no value: pass the fitted ones, as by "
                "guide_params=svi_result.params."
            )


def draw_guide(model: LatentModel, guide: Callable, guide_params: Params, batch: Batch) -> dict[str, Array]:
    """Return one draw of a guide: ``{latent: value}``, constrained, in the shapes of the guide's sites.

    Args:
        model: whose latents they are, and whose data plate the guide may visit.
        guide: takes the model's arguments.
        guide_params: constrained; those that are not the guide's are left alone.
        batch: the data.

    Raises:
        ModelError: naming a site that is no latent of the model, or a parameter without a value.
    """
    values = dict(guide_params)
    if batch.indices is not None and model.plate is not None:
        values[model.plate.name] = batch.indices
    bound = handlers.seed(handlers.substitute(guide, data=values), batch.rng_key)
    trace = trace_model(known_params(bound), *join_static(batch.data, model.static_arguments))
    draws = {}
    for name, site in trace.items():
        if site["type"] != "sample" or site["is_observed"] or site["infer"].get("is_auxiliary"):
            continue
        if name not in model.latents:
            raise ModelError(f"guide: '{name}' is not a latent site of the model; there are {list(model.latents)}.")
        draws[name] = site["value"]
    if not draws:
        raise ModelError(f"guide: it draws none of the latent sites {list(model.latents)}.")
    return draws
