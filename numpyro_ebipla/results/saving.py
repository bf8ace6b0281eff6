"""A fit in a file, written and read like a checkpoint: all that it holds but the model and its data."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_ebipla._core.errors import CheckpointError, ModelError, warn
from numpyro_ebipla._core.tree import by_path
from numpyro_ebipla.checkpoint.files import Checkpoint, fingerprint, load, restore, save
from numpyro_ebipla.checkpoint.store import differing, releases
from numpyro_ebipla.model.inspection import digest_of
from numpyro_ebipla.model.values import SiteLayout
from numpyro_ebipla.system import Call, System
from numpyro_ebipla.training.collect import Draws, Plan
from numpyro_ebipla.training.fitted import Fitted

#: What the header calls a file of this kind.
KIND = "fit"
#: Fields of the draws that are arrays or None.
ARRAYS = ("log_density", "gain", "score")


def save_fit(fit: Fitted, path: str | os.PathLike) -> Path:
    """Write a fit; see :meth:`.Fit.save`."""
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise TypeError(f"save: path must be that of a file, got {path!r}.")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"save: there is no directory '{Path(path).parent}'.")
    state, data = fit.state, fit.batch(None, fit.state.rng_key).data
    plan = fit.plan._asdict()
    indices, plan["max_bytes"] = plan.pop("indices"), float(plan["max_bytes"])
    arrays = {f"params{name}": leaf for name, leaf in by_path(fit.params).items()}
    if indices is not None:
        arrays["indices"] = np.asarray(indices)
    if fit.draws is not None:
        arrays |= _flat(fit.draws)
    meta = {
        "kind": KIND,
        "step": int(state.step),
        "stopped": fit.stopped,
        "plan": plan,
        "layout": {name: (site.shape, np.dtype(site.dtype).name, site.axis) for name, site in fit.layout.items()},
        "x64": jax.config.read("jax_enable_x64"),
        "data": fingerprint(jax.tree.leaves(data)),
        "model": digest_of(fit.config.model, state.params, state.mutable, data),
        "releases": releases(),
    }
    return save(path, state, fit.history, meta, fit=arrays)


def read_file(path: str | os.PathLike) -> Checkpoint:
    """Read what :func:`save_fit` wrote.

    Raises:
        FileNotFoundError, CheckpointError: if there is no such file, or it is damaged or holds no fit.
    """
    found = load(path)
    if found.header.get("kind") != KIND:
        raise CheckpointError(
            f"load: '{path}' is a checkpoint of a run and holds no fit: run(checkpoint_dir=…) goes on from it."
        )
    return found


def restore_fit(found: Checkpoint, system: System, call: Call, model: Callable) -> Fitted:
    """Return the fit in a file, which must be of this system and these arguments; see :meth:`.EBIPLA.load`."""
    _check_same(found, system, call)
    remedy = "Pass the model, the arguments and the settings of EBIPLA(…) of that fit"
    about = found.header["state"][".rng_key"]
    key = random.wrap_key_data(jnp.asarray(found.state[".rng_key"]), impl=about["impl"])
    state = restore(found, system.shapes()._replace(rng_key=key), "load", remedy)  # there are kinds of keys
    latent_model, header, arrays = system.config.model, found.header, found.fit
    like = jax.eval_shape(latent_model.constrain_params, state.params)
    values = [jnp.asarray(arrays[f"params{name}"]) for name in by_path(like)]
    params = jax.tree.unflatten(jax.tree.structure(like), values)
    sites = {name: tuple(header["plan"][name]) for name in ("sites", "left_out")}
    plan = Plan(**{**header["plan"], **sites, "indices": arrays.get("indices")})
    layout = {
        name: SiteLayout(tuple(shape), jnp.dtype(dtype), axis)
        for name, (shape, dtype, axis) in header["layout"].items()
    }
    record = (params, state, found.history, header["stopped"], model, call.args, call.kwargs)
    return Fitted(*record, _draws(arrays), plan, layout, system.config)


def _check_same(found: Checkpoint, system: System, call: Call) -> None:
    """Raise unless a file holds a fit of this model, data and precision.

    Raises:
        ModelError: saying which of them it is.
    """
    header, path = found.header, found.path
    x64 = jax.config.read("jax_enable_x64")
    if header["x64"] != x64:
        was = f"jax_enable_x64={not x64}"
        raise ModelError(f"load: '{path}' was saved with {was}: call numpyro.enable_x64({not x64}) first.")
    if header["data"] != fingerprint(jax.tree.leaves(call.data)):
        raise ModelError(
            f"load: '{path}' is a fit of other data: pass those that were fitted, and new ones to "
            "infer(rng_key, fit.params, …)."
        )
    if header["model"] == system.inspection.digest:
        return
    if header["releases"] == releases():
        raise ModelError(
            f"load: '{path}' is a fit of another model, or with another batch_size or the like: pass those of that fit."
        )
    warn(
        f"load: releases differ from those of '{path}' ({differing(header['releases'])}), so it cannot be told whether "
        "the model is the same."
    )


def _flat(draws: Draws) -> dict[str, Any]:
    """Return the arrays of draws by name."""
    found = {f"samples/{name}": value for name, value in draws.samples.items()}
    found |= {f"accept/{name}": value for name, value in draws.accept.items()}
    found |= {name: getattr(draws, name) for name in ARRAYS if getattr(draws, name) is not None}
    if draws.newton is not None:
        found |= dict(zip(("newton/slope", "newton/curvature"), draws.newton, strict=True))
    return found


def _draws(arrays: dict[str, np.ndarray]) -> Draws | None:
    """Invert :func:`_flat`."""
    if "log_density" not in arrays:
        return None
    within = lambda group: {k.removeprefix(group): v for k, v in arrays.items() if k.startswith(group)}
    newton = within("newton/")
    return Draws(
        samples=within("samples/"),
        accept=within("accept/"),
        **{name: arrays.get(name) for name in ARRAYS},
        newton=(newton["slope"], newton["curvature"]) if newton else None,
    )
