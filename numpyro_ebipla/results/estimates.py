"""Standard errors, a table of the parameters, and tests, from the observed information and annealed likelihoods."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from scipy import stats

from numpyro_ebipla._core.show import html_table, text_table
from numpyro_ebipla._core.state import Params
from numpyro_ebipla.model.handlers import simulated
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.results.information import chosen_params, information, scores
from numpyro_ebipla.smc.normaliser import Estimate
from numpyro_ebipla.training.fitted import Fitted
from numpyro_ebipla.training.information import (
    ERRORS,
    LEAST_KNOWN,
    by_coordinate,
    principal_directions,
)

#: Ways to know the covariance of estimates.
KINDS = ("information", "scores", "sandwich")
#: Times what the precision leaves unknown, from which a curvature is known. Fits without a scale near zero are at 1e5
#: and more; a location beside a scale of 1e-3 is at 2.7, with its error right to a tenth; below, errors were 0.07 to
#: 0.5 of the exact ones.
ROUNDED = 2.0
#: Share of a number's own direction of which nothing is known, from which it has no standard error.
LEAST_SHARE = 1e-3


class Covariance(NamedTuple):
    """Covariance of the estimates.

    Attributes:
        names: of n numbers, with their index: ``"beta[0]"``.
        value: ``[n, n]``, constrained; NaN for numbers of which the data know nothing.
    """

    names: tuple[str, ...]
    value: np.ndarray


@dataclass(frozen=True, repr=False)
class ParameterTable:
    """Estimates with standard errors and Wald intervals; printed, a table.

    Attributes:
        names: with index.
        estimate: ``[n]``, constrained.
        std_error: ``[n]``; NaN where the likelihood is level, as for a variance at zero.
        lower: ``[n]`` ends of the intervals.
        upper: ``[n]`` likewise.
        prob: that an interval covers.
    """

    names: tuple[str, ...]
    estimate: np.ndarray
    std_error: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    prob: float

    def to_dict(self) -> dict[str, list]:
        """Return the columns, for ``pandas.DataFrame(table.to_dict()).set_index("names")``."""
        columns = [f.name for f in fields(self) if f.name != "prob"]
        return {name: list(getattr(self, name)) for name in columns}

    def __repr__(self) -> str:
        return text_table(self._rows(), 12, self._notes())

    def to_html(self) -> str:
        """Return the table as notebooks show it."""
        header, *rows = self._rows()
        return html_table(header, rows, self._notes())

    _repr_html_ = to_html

    def _rows(self) -> list[list[str]]:
        low, high = 50 * (1 - self.prob), 50 * (1 + self.prob)
        rows = [["", "estimate", "std error", f"{low:.3g} %", f"{high:.3g} %"]]
        for name, *numbers in zip(self.names, self.estimate, self.std_error, self.lower, self.upper, strict=True):
            rows.append([name, *("–" if np.isnan(number) else f"{number:.4g}" for number in numbers)])
        return rows

    def _notes(self) -> list[str]:
        if not np.isnan(self.std_error).any():
            return []
        return [
            "–: the likelihood is level there, as for a variance at zero or a rotation of factors; or beside a scale",
            "near zero single precision cannot tell (numpyro.enable_x64() and float64 data can)",
        ]


def array_name(path: tuple) -> str:
    """Return the name of an array in a tree of parameters: the site's, and where in it the array is."""
    return str(path[0].key) + jax.tree_util.keystr(path[1:])


def parameter_names(params: Params) -> tuple[str, ...]:
    """Return a name for each number in the order of :func:`jax.flatten_util.ravel_pytree`.

    >>> parameter_names({"b": np.zeros(2), "a": 0.0, "net": {"w": np.zeros((1, 2))}})
    ('a', 'b[0]', 'b[1]', "net['w'][0,0]", "net['w'][0,1]")
    """
    names = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = array_name(path)
        shape = np.shape(leaf)
        names += [f"{name}[{','.join(map(str, i))}]" if shape else name for i in np.ndindex(*shape)]
    return tuple(names)


def has_information(fit: Fitted) -> bool:
    """Return whether the observed information of all parameters is known."""
    return fit.draws is not None and fit.draws.newton is not None and by_coordinate(fit.state.params)


def parameter_covariance(
    fit: Fitted,
    params: Any = None,
    kind: str = "information",
    cluster: Any = None,
    functions: Mapping[str, Callable[[Params], Any]] | None = None,
) -> tuple[Covariance, np.ndarray]:
    """Return the covariance of estimates ``[n]``, and these: parameters in their own space, or functions of them.

    Args:
        fit: a fit.
        params: see :meth:`.Fit.covariance`.
        kind: likewise.
        cluster: likewise.
        functions: see :meth:`.Fit.summary`.

    Raises:
        ModelError: if the information is not known, saying why.
        ValueError: for a kind that there is not.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}.")
    if cluster is not None and kind == "information":
        raise ValueError("cluster belongs to kind='scores' or kind='sandwich'; the information has no need of it.")
    theta = chosen_params(fit, params)
    names, estimate, jacobian = _linearise(fit, theta, functions)
    meat = None
    if kind != "information":
        first, second = scores(fit, theta, cluster)
        # Of independent halves, so that their noise adds nothing; those of some data stand for all.
        meat = _symmetric(first.T @ second) * (fit.config.model.num_data / len(fit.collected))
    if kind == "scores" and meat is not None:
        each, rounding = meat[None], np.zeros(len(meat))
    else:
        each, rounding = information(fit, theta)
        each = _symmetric(each)
    told = _above_noise(each.diagonal(axis1=1, axis2=2), ROUNDED * rounding)
    value, vector = principal_directions(each.mean(0)[np.ix_(told, told)])
    vector = np.eye(len(told))[:, told] @ vector
    known = _above_noise(np.einsum("il,pij,jl->pl", vector, each, vector), LEAST_KNOWN)
    along_each = jacobian @ vector
    total = np.sum(np.square(along_each), 1)
    lost = np.sum(np.square(along_each[:, ~known]), 1) > LEAST_SHARE * total
    lost |= (jacobian[:, ~told] != 0).any(1)
    half = along_each[:, known] / np.sqrt(value[known])
    whiten = vector[:, known] / np.sqrt(value[known])
    middle = whiten.T @ meat @ whiten if kind == "sandwich" and meat is not None else np.eye(len(half.T))
    covariance = half @ middle @ half.T
    covariance[lost] = covariance[:, lost] = np.nan
    return Covariance(names, covariance), estimate


def parameter_table(fit: Fitted, prob: float, *options: Any) -> ParameterTable:
    """Return the estimates with standard errors and intervals; see :func:`parameter_covariance`."""
    covariance, estimate = parameter_covariance(fit, *options)
    error = np.sqrt(np.diag(covariance.value))
    reach = stats.norm.ppf(0.5 + prob / 2) * error
    return ParameterTable(covariance.names, estimate, error, estimate - reach, estimate + reach, prob)


def _linearise(
    fit: Fitted, theta: Params, functions: Mapping[str, Callable[[Params], Any]] | None
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Return names, estimates ``[n]`` and their derivatives ``[n, L]`` by unconstrained parameters."""
    model = fit.config.model
    if functions is None:
        names = parameter_names(jax.eval_shape(model.constrain_params, theta))
        estimate, jacobian = model.compiled(_in_own_space)(theta)
        return names, np.asarray(estimate, np.float64), np.asarray(jacobian, np.float64)
    free, unflatten = ravel_pytree(theta)

    def values(free: Array) -> list[Params]:
        params = fit.params | model.constrain_params(unflatten(free))
        return [{name: jnp.asarray(function(params))} for name, function in functions.items()]

    flat = lambda free: jnp.concatenate([ravel_pytree(value)[0] for value in values(free)])
    names = tuple(name for value in values(free) for name in parameter_names(value))
    return names, np.asarray(flat(free), np.float64), np.asarray(jax.jacfwd(flat)(free), np.float64)


def _in_own_space(model: LatentModel, theta: Params) -> tuple[Array, Array]:
    free, unflatten = ravel_pytree(theta)
    flat = lambda free: ravel_pytree(model.constrain_params(unflatten(free)))[0]
    return flat(free), jax.jacfwd(flat)(free)


def _above_noise(each: np.ndarray, least: float | np.ndarray = 0.0) -> np.ndarray:
    """Return of which of L curvatures ``[P, L]``, from P groups of draws, more is known than that they are above zero.

    A coordinate of which the data know nothing, such as the logarithm of a variance at zero, is told apart first: in
    units of its own noise it would hide all others. They are then known as if it stood still.
    """
    noise = each.std(0, ddof=1) / np.sqrt(len(each)) if len(each) > 1 else 0.0
    return each.mean(0) > np.maximum(least, ERRORS * noise)


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    return (matrix + matrix.swapaxes(-1, -2)) / 2


# --- tests and selection --------------------------------------------------------------------------------


def num_parameters(fit: Fitted) -> int:
    """Return how many free numbers were fitted: a Cholesky factor of correlations counts what is free in it."""
    return sum(x.size for x in jax.tree.leaves(fit.state.params))


def num_observations(fit: Fitted) -> int:
    """Return how many observations there are, vectors counted as one: the elements of all observed sites."""
    model, count = fit.config.model, 0.0
    batch = fit.batch(model.blocks(joint=False)[0], jax.random.key(0))

    def look(batch: Any) -> None:
        nonlocal count
        for site in model.sites(fit.params, batch).values():
            if simulated(site):
                whole = model.num_data / model.batch_size if model.is_local(site) else 1.0
                count += whole * math.prod(site["fn"].batch_shape)

    jax.eval_shape(look, batch)
    return round(count)


def akaike(fit: Fitted, log_likelihood: Any) -> float:
    """Return Akaike's criterion for this log likelihood."""
    return 2 * num_parameters(fit) - 2 * float(log_likelihood)


def schwarz(fit: Fitted, log_likelihood: Any) -> float:
    """Return Schwarz's criterion for this log likelihood."""
    return num_parameters(fit) * math.log(num_observations(fit)) - 2 * float(log_likelihood)


class Comparison(NamedTuple):
    """A likelihood-ratio test of two nested models.

    Attributes:
        statistic: twice the difference of the log likelihoods.
        std_error: Monte Carlo error of the statistic.
        df: difference of the numbers of parameters.
        p_value: by χ² of ``df`` degrees of freedom.
        p_value_at_boundary: by half χ² of ``df`` and half of ``df − 1``: if the smaller model is the larger one with
            one variance at zero, whose covariances, if any, go with it (Self and Liang, 1987; Stram and Lee, 1994).
    """

    statistic: float
    std_error: float
    df: int
    p_value: float
    p_value_at_boundary: float


def likelihood_ratio(smaller: Estimate, larger: Estimate, df: int) -> Comparison:
    """Return the test of two log likelihoods.

    >>> round(likelihood_ratio(Estimate(-102.0, 0.0), Estimate(-100.0, 0.0), 1).p_value, 4)
    0.0455
    """
    statistic = 2 * float(larger.value - smaller.value)
    error = 2 * float(np.hypot(larger.std_error, smaller.std_error))
    above = max(statistic, 0.0)
    whole = float(stats.chi2.sf(above, df))
    half = float(stats.chi2.sf(above, df - 1)) if df > 1 else float(above <= 0)
    return Comparison(statistic, error, df, whole, (whole + half) / 2)


@dataclass(frozen=True, repr=False)
class ComparisonTable:
    """Fits of one data set by AIC; printed, a table.

    Attributes:
        rows: ``{name: {"log_likelihood", "std_error", "parameters", "aic", "bic"}}``, the lowest AIC first.
        tests: ``{(smaller, larger): Comparison}`` of fits next to each other by number of parameters. They mean
            what they say for nested models only.
    """

    rows: dict[str, dict[str, float]]
    tests: dict[tuple[str, str], Comparison]

    def __repr__(self) -> str:
        return text_table(self._cells(), 16, self._sentences())

    def _repr_html_(self) -> str:
        header, *rows = self._cells()
        return html_table(header, rows, self._sentences())

    def _cells(self) -> list[list[str]]:
        columns = ("log_likelihood", "std_error", "parameters", "aic", "bic")
        cells = [["", *(column.replace("_", " ") for column in columns)]]
        return cells + [[name, *(f"{row[column]:.6g}" for column in columns)] for name, row in self.rows.items()]

    def _sentences(self) -> list[str]:
        return [
            f"{larger} against {smaller}, if nested: χ² = {test.statistic:.2f} ± {test.std_error:.2g}, {test.df} df, "
            f"p = {test.p_value:.3g} ({test.p_value_at_boundary:.3g} if {smaller} has a variance at zero)"
            for (smaller, larger), test in self.tests.items()
        ]


def compare(fits: Mapping[str, Any] | Sequence[Any]) -> ComparisonTable:
    """Compare fits of the same data by their log likelihoods.

    Args:
        fits: by name, or a list of them.

    Raises:
        ValueError: for fewer than two fits, or fits of different numbers of observations.

    >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
    >>> from jax import random
    >>> from numpyro_ebipla import EBIPLA
    >>> def model(y, mean=None):
    ...     mean = numpyro.param("mean", 0.0) if mean is None else mean
    ...     scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
    ...     with numpyro.plate("data", len(y)):
    ...         x = numpyro.sample("x", dist.Normal(mean, scale))
    ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
    >>> y, key = jnp.arange(20.0) / 5, random.key(0)
    >>> free = EBIPLA(model, num_steps=500).run(key, y, progress_bar=False)
    >>> zero = EBIPLA(model, num_steps=500).run(key, y, mean=0.0, progress_bar=False)
    >>> found = compare({"free": free, "mean zero": zero})
    >>> list(found.rows), found.tests["mean zero", "free"].df
    (['free', 'mean zero'], 1)
    """
    if not isinstance(fits, Mapping):
        fits = {f"fit {i}": fit for i, fit in enumerate(fits)}
    if len(fits) < 2:
        raise ValueError("compare needs at least two fits: compare({'with': fit, 'without': other}).")
    sizes = {name: num_observations(fit) for name, fit in fits.items()}
    if len({*sizes.values()}) > 1:
        raise ValueError(f"compare needs fits of the same data, and these have different numbers of them: {sizes}.")
    found = {name: fit.log_likelihood() for name, fit in fits.items()}
    number = {name: num_parameters(fit) for name, fit in fits.items()}
    rows = {}
    for name, fit in fits.items():
        value, error = found[name]
        rows[name] = {
            "log_likelihood": float(value),
            "std_error": float(error),
            "parameters": number[name],
            "aic": akaike(fit, value),
            "bic": schwarz(fit, value),
        }
    order = sorted(fits, key=number.__getitem__)
    tests = {
        (small, large): likelihood_ratio(found[small], found[large], number[large] - number[small])
        for small, large in pairwise(order)
        if number[large] > number[small]
    }
    return ComparisonTable(dict(sorted(rows.items(), key=lambda item: item[1]["aic"])), tests)
