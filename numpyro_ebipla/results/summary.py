"""The text of a fit for the terminal."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.diagnostics import summary

from numpyro_ebipla._core.state import Params
from numpyro_ebipla._core.tree import spaced
from numpyro_ebipla.results.estimates import array_name, has_information, parameter_table
from numpyro_ebipla.results.sites import chosen_indices, posterior_variables
from numpyro_ebipla.training.fitted import Fitted

#: Scalars of a site over which a summary computes its diagnostics, at most.
MAX_DIAGNOSED = 1000
#: Parameter arrays that a summary lists, at most.
MAX_LISTED = 20
#: Of the parameters' intervals.
WALD = 0.95
#: Of the history, besides the contrast and acceptances.
SHOWN = ("log_z", "swap", "ess")


def summary_lines(fit: Fitted, var_names: Sequence[str] | None, indices: Any, prob: float, max_rows: int) -> list[str]:
    """Return the lines of :meth:`.Fit.print_summary`, without the diagnostics."""
    lines = [repr(fit), *_run_lines(fit), "", *_param_lines(fit)]
    if fit.draws is not None:
        lines += ["", *_site_lines(fit, var_names, indices, prob, max_rows)]
    return lines


def html_of(fit: Fitted) -> str:
    """Return what a notebook shows of a fit: what it is, and its parameters."""
    if has_information(fit):
        params = parameter_table(fit, WALD).to_html()
    else:
        params = f"<pre>{escape(chr(10).join(_param_lines(fit)))}</pre>"
    stopped = f"<p>{escape(fit.stopped)}</p>" if fit.stopped else ""
    return f"<p><b>{escape(repr(fit))}</b></p>{stopped}{params}"


def _run_lines(fit: Fitted) -> Iterator[str]:
    """Say why the run ended and what the history ends with."""
    if fit.stopped:
        yield f"stopped: {fit.stopped}"
    for name, values in fit.history.items():
        last = name.rpartition("/")[2]
        if len(values) and (name == "contrast" or last.startswith("accept") or last in SHOWN):
            tail = values[-max(1, len(values) // 10) :]
            yield f"{name}: {values[-1]:.4g} at the last step, mean {np.mean(tail):.4g} over the last tenth"
    model = fit.config.model
    if model.subsampled and model.local_sites:
        visits = int(fit.state.step) * model.batch_size / model.num_data
        moves = visits * fit.config.particles.num_moves
        yield f"each datum's particles: {visits:.3g} visits so far, {moves:.3g} moves"


def _param_lines(fit: Fitted) -> list[str]:
    """Return the table of the parameters, if their standard errors are known, else scalars, shapes and norms."""
    held = [f"{line} (held)" for line in _array_lines(fit.config.model.held)]
    if has_information(fit):
        return [str(parameter_table(fit, WALD)), *held]
    params = fit.trained_params
    size = sum(int(jnp.size(leaf)) for leaf in jax.tree.leaves(params))
    return [f"parameters ({size} scalars):", *_array_lines(params), *held]


def _array_lines(params: Params) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    lines = []
    for path, leaf in leaves[:MAX_LISTED]:
        name = array_name(path)
        if jnp.size(leaf) == 1:
            lines.append(f"{name} = {float(jnp.reshape(leaf, ())):.4g}")
        else:
            lines.append(f"{name}: shape {jnp.shape(leaf)}, norm {float(jnp.linalg.norm(jnp.ravel(leaf))):.4g}")
    if len(leaves) > MAX_LISTED:
        lines.append(f"… and {len(leaves) - MAX_LISTED} more arrays")
    return lines


def _site_lines(fit: Fitted, var_names: Sequence[str] | None, indices: Any, prob: float, max_rows: int) -> list[str]:
    """Return a table of the draws' diagnostics."""
    chosen = chosen_indices(fit, indices)
    variables = posterior_variables(fit, var_names, chosen, {})
    if fit.num_samples < 4:
        return [f"R-hat and ESS need at least 4 draws of each particle, there are {fit.num_samples}."]
    rows, notes = [], []
    for name, variable in variables.items():
        labels = [chosen if dim == fit.plate_name else None for dim in variable.dims]
        flat = variable.values.reshape((*variable.values.shape[:2], -1))
        size = flat.shape[-1]
        diagnosed = spaced(size, MAX_DIAGNOSED)
        with np.errstate(divide="ignore", invalid="ignore"):  # of what is the same in all draws there is no R-hat
            table = summary({name: flat[..., diagnosed]}, prob)[name]
        for i in spaced(len(diagnosed), max_rows):
            at = np.unravel_index(diagnosed[i], variable.values.shape[2:])
            label = [str(a if names is None else names[a]) for a, names in zip(at, labels, strict=True)]
            text = f"{name}[{','.join(label)}]" if label else name
            rows.append((text, [float(column[i]) for column in table.values()]))
        varies = np.isfinite(table["r_hat"])
        if size > max_rows and varies.any():
            which = f"all {size}" if len(diagnosed) == size else f"{len(diagnosed)} of {size}"
            r_hat, n_eff = table["r_hat"][varies], table["n_eff"][varies]
            notes.append(
                f"{name}: {max_rows} of {size} scalars shown; over {which}: r_hat max {np.max(r_hat):.3f}, "
                f"median {np.median(r_hat):.3f}; n_eff min {np.min(n_eff):.0f}, median {np.median(n_eff):.0f}"
            )
    width = max([len(text) for text, _ in rows] + [10])
    header = " " * width + "".join(f"{column:>10}" for column in table)
    body = [f"{text:>{width}}" + "".join(f"{v:>10.2f}" for v in values) for text, values in rows]
    return [header, *body, *notes]
