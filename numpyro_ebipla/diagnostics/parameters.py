r"""How far from the maximum of the likelihood a run has ended, in nats per datum.

By Fisher's identity the particles know the slope of the log likelihood, and by Jensen's inequality a bound of what the
last steps have gained; both need ``log Z`` of energy priors, which fresh draws supply.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from numpyro_ebipla._core.state import Params
from numpyro_ebipla.diagnostics.checks import MORE_STEPS, Check, Rule
from numpyro_ebipla.diagnostics.prior import FreshDraws, flat_draws
from numpyro_ebipla.likelihood.normalisers import log_z_shift
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.smc.normaliser import Estimate
from numpyro_ebipla.smc.weights import log_mean_exp
from numpyro_ebipla.training.collect import Draws
from numpyro_ebipla.training.information import (
    ERRORS,
    LEAST_KNOWN,
    by_coordinate,
    num_directions,
    principal_directions,
    slopes,
)

#: Nats per datum that a settled run may have gained or left, and of the former what noise may hide.
SETTLED, HIDDEN = 0.005, 0.05
#: Nats of all data together: a fraction of a standard error of a parameter.
SETTLED_IN_ALL, HIDDEN_IN_ALL = 0.1, 1.0
GAINED = Rule(
    "nats still gained",
    SETTLED,
    "the last third of the run changed little",
    "the parameters were still moving",
    MORE_STEPS,
    most_slack=HIDDEN,
)
GAINED_IN_ALL = GAINED._replace(
    name="nats still gained, in all",
    limit=SETTLED_IN_ALL,
    good="the last steps changed little",
    most_slack=HIDDEN_IN_ALL,
)
LEFT = Rule(
    "nats to gain",
    SETTLED,
    "the likelihood is level where the run ended",
    "the likelihood still rises where the run ended",
    f"{MORE_STEPS}, or a higher rate",
)
LEFT_IN_ALL = Rule(
    "nats to gain, in all",
    SETTLED_IN_ALL,
    "the parameters are where the likelihood is highest, within a fraction of their standard errors",
    "the likelihood still rises where the run ended",
    MORE_STEPS,
    most_slack=HIDDEN_IN_ALL,
)


SILENT = Rule(
    "parameters without effect",
    0,
    "the likelihood depends on every parameter",
    "the likelihood is level in {} where the run ended, so that nothing moves them",
    "a start nearer to the data (init_params=…), data in other units, or a model without them",
)

#: Curvature from which scores by datum know something, whose noise is known apart: what single precision leaves. Powers
#: of data between 0 and 1, up to the fourth, have one of 3e-5: it was taken for none, and a fit 2.1 nats short for one
#: that had arrived.
LEAST_KNOWN_BY_DATUM = 1e-6


class Climb(NamedTuple):
    """What is known of the way up from where a run ended, along L directions, in nats of all data.

    Attributes:
        slopes: ``[2, L]`` two independent estimates of the slope, whose mean is the estimate.
        noise: ``[L, L]`` covariance of their mean.
        information: ``[L, L]`` minus the second derivatives.
        blur: ``[L, L]`` what of that may be noise.
        least: curvature from which something is known, in units of each parameter's own, beside that noise.
    """

    slopes: np.ndarray
    noise: np.ndarray
    information: np.ndarray
    blur: np.ndarray
    least: float = LEAST_KNOWN

    def left(self) -> tuple[float, float]:
        """Return what a Newton step would gain, and its standard error.

        Directions of which nothing is known, in which the likelihood is level or bends upwards, as that of a variance
        at zero or a rotation of factors, count by their slope alone, as far as it is no noise.
        """
        value, vector = principal_directions(self.information)
        known = value > self.least + ERRORS * np.einsum("il,ij,jl->l", vector, self.blur, vector)
        whiten, rest = vector[:, known] / np.sqrt(value[known]), vector[:, ~known]
        first, second = self.slopes @ whiten
        noise = whiten.T @ self.noise @ whiten
        left = 0.5 * first @ second
        # Of half the product of two independent means; each has twice the noise of both together.
        error = np.sqrt(np.sum(noise**2) + 2 * max(left, 0.0) * np.trace(noise))
        rest = rest / np.maximum(np.linalg.norm(rest, axis=0), np.finfo(float).tiny)
        rise = np.abs(self.slopes.mean(0) @ rest)
        rise -= ERRORS * np.sqrt(np.einsum("il,ij,jl->l", rest, self.noise, rest))
        return float(left + np.maximum(rise, 0.0).sum()), float(error)


def check_parameters(
    model: LatentModel,
    thetas: tuple[Params, Params],
    batch: Batch,
    fresh: dict[str, FreshDraws],
    draws: Draws | None,
    num_particles: int,
    chosen: np.ndarray,
) -> list[Check]:
    """Check the parameters reached.

    Args:
        model: the model.
        thetas: those reached and the slow average, unconstrained.
        batch: data for which the normalisers of conditional priors are looked at: the first of ``chosen``.
        fresh: ``{energy site: draws}`` at the parameters reached.
        draws: of the particles, None without latents.
        num_particles: N.
        chosen: ``[M']`` the data of the draws.
    """
    if draws is not None and draws.newton is not None:
        climb = climb_of_newton(*draws.newton)
        found = check_newton(climb, thetas[0], model.num_data if model.subsampled else None)
        return found + check_effects(climb, thetas[0], model)
    if draws is None:
        score = np.asarray(model.map_blocks(partial(model.compiled(data_score), thetas), batch, 1, chosen))
    else:
        score = draws.score
    change, shift = (
        map(np.asarray, model.compiled(normaliser_shifts)(thetas, batch, fresh)) if fresh else (np.zeros(1), None)
    )
    if score is None:
        assert draws is not None, "without draws there are scores"
        return [check_gain(draws.gain + change.mean() * model.num_data, model.num_data)]
    shared = np.zeros((score.shape[-1],) * 2)
    if shift is not None:
        if any(model.energies[name].per_datum for name in fresh):  # then it is known of these data only
            shift = shift[:, : len(chosen)] if model.subsampled else shift[:, chosen]
            score = score[:, : shift.shape[1]]
        else:
            shift = shift.mean(1, keepdims=True)
        score = score + np.stack([half.mean(0) for half in np.array_split(shift, 2)])
        shared = np.cov(shift.mean(1).T).reshape(shared.shape) / len(shift)
    climb = climb_of_score(score, shared, model.num_data)
    return check_score(climb, score, np.asarray(way_of(*thetas)), num_particles, model.num_data)


def check_gain(gain: np.ndarray, num_data: int) -> Check:
    """Check what the last third of the run was still worth, in nats per datum, where global latents couple the data.

    With particles of the posterior at θ, ``E[log p_θ(x, y) − log p_θ'(x, y)] ≥ log p_θ(y) − log p_θ'(y)``, by
    Jensen's inequality, as in the EM algorithm. Here θ' is the average over the last third of the steps.

    Args:
        gain: ``[N]``, see :attr:`.Draws.gain`, with log normalisers.
        num_data: M.
    """
    error = gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else np.inf
    return GAINED.judge(gain.mean() / num_data, slack=ERRORS * error / num_data)


def way_of(params: Params, before: Params) -> Array:
    """Return the way from the slow average ``[L]``, along the directions of :func:`.go_along`."""
    if not by_coordinate(params):
        return jnp.ones(num_directions(params))
    return ravel_pytree(params)[0] - ravel_pytree(before)[0]


def check_newton(climb: Climb, params: Params, num_data: int | None) -> list[Check]:
    """Check what a Newton step would gain.

    Where directions are fewer than the parameters, that is a lower bound; then what the last steps gained counts, too.

    Args:
        climb: see :func:`climb_of_newton`.
        params: unconstrained.
        num_data: M if the figures are to be per datum, None for all data together.
    """
    left, error = climb.left()
    if num_data is not None:
        return [LEFT.judge(left / num_data, slack=ERRORS * error / num_data)]
    checks = [LEFT_IN_ALL.judge(left, slack=ERRORS * error)]
    if not by_coordinate(params):
        gained = abs(climb.slopes.mean(0).sum()) + 0.5 * max(climb.information.sum(), 0.0)
        checks.insert(0, GAINED_IN_ALL.judge(gained, slack=ERRORS * float(np.sqrt(climb.noise.sum()))))
    return checks


def check_effects(climb: Climb, params: Params, model: LatentModel) -> list[Check]:
    """Name parameters that no slope and no curvature knows, such as the middle of a curve that lies beyond all data.

    Scales and other constrained ones may vanish at their boundary and are left out.

    Args:
        climb: see :func:`climb_of_newton`.
        params: unconstrained.
        model: the model.
    """
    if not by_coordinate(params):
        return []
    known = np.any(climb.slopes != 0, 0) | (np.diag(climb.information) != 0)
    silent, start = [], 0
    for name in sorted(params):  # the order of JAX
        end = start + sum(np.size(leaf) for leaf in jax.tree.leaves(params[name]))
        if name not in model.param_transforms and not known[start:end].any():
            silent.append(name)
        start = end
    return [SILENT._replace(bad=SILENT.bad.format(silent)).judge(len(silent))] if silent else []


def climb_of_newton(slope: np.ndarray, curvature: np.ndarray) -> Climb:
    """Return what is known from slopes and curvatures.

    Args:
        slope: ``[K, P, L]`` of K blocks of data by P groups of draws, see :attr:`.Draws.newton`.
        curvature: ``[K, P, L, L]``.
    """
    slope, curvature = slope.astype(np.float64).sum(0), curvature.astype(np.float64).sum(0)
    mean = curvature.mean(0)
    if len(slope) < 2:
        spread = np.full(mean.shape, np.inf)
    else:
        spread = np.cov(slope.T).reshape(mean.shape) / len(slope)
    parts = np.array_split(slope, 2)
    return Climb(
        slopes=np.stack([parts[0].mean(0), parts[-1].mean(0)]),
        noise=spread,
        information=(mean + mean.T) / 2,
        blur=np.zeros_like(mean),
    )


def climb_of_score(score: np.ndarray, shared: np.ndarray, num_data: int) -> Climb:
    """Return what is known from the scores of independent data.

    The score of each datum is the posterior mean of that of ``log p_θ(x, y)`` (Fisher's identity); the mean score is
    the slope of the log likelihood, the covariance of the scores its curvature. Two halves of the particles tell the
    noise of their means.

    Args:
        score: ``[2, M', L]``, see :attr:`.Draws.score`, with log normalisers.
        shared: ``[L, L]`` covariance of an error of the mean score that all data share.
        num_data: M.
    """
    score = score.astype(np.float64)
    first, second = score - score.mean(1, keepdims=True)
    noise = _noise(score)
    number, size = first.shape
    product = first.T @ second / number
    # The inverse of a covariance from few data is too large, in all directions alike; from too few it is none.
    if number > 2 * (size + 1):
        product *= number / (number - size - 1)
    else:
        product += size / number * np.diag(np.diag(product))
    return Climb(
        slopes=num_data * score.mean(1),
        noise=num_data**2 * (noise + shared),
        information=num_data * (product + product.T) / 2,
        blur=num_data * np.sqrt(number) * noise,
        least=LEAST_KNOWN_BY_DATUM,
    )


def check_score(climb: Climb, score: np.ndarray, way: np.ndarray, num_particles: int, num_data: int) -> list[Check]:
    """Check what the last third of the run was worth, and what is left, in nats per datum.

    What was gained is to second order. What is left is a lower bound where directions are fewer than parameters.

    Args:
        climb: see :func:`climb_of_score`.
        score: ``[2, M', L]``.
        way: ``[L]`` of the last third of the run, see :func:`way_of`.
        num_particles: N.
        num_data: M.
    """
    along = score.astype(np.float64) @ way
    gained = along.mean() + 0.5 * _common(along)
    gained_error = np.sqrt(way @ climb.noise @ way) / num_data
    left, left_error = (figure / num_data for figure in climb.left())
    # Thrice what the particles' noise leaves at the maximum.
    slack = 3 * np.sqrt(score.shape[-1]) / (score.shape[1] * num_particles)
    return [
        GAINED.judge(gained, slack=slack + ERRORS * gained_error),
        LEFT.judge(left, slack=slack + ERRORS * left_error),
    ]


def _common(halves: np.ndarray) -> float:
    """Return the variance over the data ``[2, M']`` that both halves agree on: noise is not information."""
    first, second = halves - halves.mean(1, keepdims=True)
    return float((first * second).mean())


def _noise(halves: np.ndarray) -> np.ndarray:
    """Return the particles' part of the covariance ``[L, L]`` of the mean of ``[2, M', L]``: how the halves differ."""
    apart = 0.5 * (halves[0] - halves[1])
    return apart.T @ apart / len(apart) ** 2


def data_score(model: LatentModel, thetas: tuple[Params, Params], batch: Batch) -> Array:
    """Return :attr:`.Draws.score` of a model without latents, whose data stand in both halves."""
    density = lambda params: model.log_joint(model.constrain_params(params), {}, {}, batch, {}).per_datum
    return slopes(density, *thetas)[jnp.array([0, 0])]


# --- what normalisers contribute ----------------------------------------------------------------------


def normaliser_shifts(
    model: LatentModel, thetas: tuple[Params, Params], batch: Batch, fresh: dict[str, FreshDraws]
) -> tuple[Array, Array]:
    """Return what changes of every ``log Z`` add to the log density of each datum.

    Returns:
        ``[B]`` for the way from the slow average; for going on by as much with one array at a time ``[K, B, L]``, from
        each population of fresh draws by itself.
    """
    priors = model.energy_priors(model.constrain_params(thetas[0]), batch)

    def densities(params: Params) -> dict[str, Array]:
        tilted = model.tilted(model.constrain_params(params), batch)
        return {name: tilted[name].log_density(flat_draws(fresh[name])) for name in fresh}

    # Draws at θ: Z(θ') / Z(θ) is the mean ratio of the densities, ∇ log Z the mean of their slopes.
    now, before = (densities(theta) for theta in thetas)
    change = {name: -log_mean_exp(before[name] - now[name]).reshape(priors[name].batch_shape) for name in fresh}
    slope = {}
    for name, value in change.items():
        num = len(fresh[name].draws)
        means = lambda name, num, p: densities(p)[name].reshape(num, -1, *priors[name].batch_shape).mean(1)
        along = slopes(partial(means, name, num), *thetas)
        slope[name] = jnp.moveaxis(along, -1, 1).reshape((num, -1, *value.shape))
    estimates = {name: Estimate(value, jnp.zeros_like(value)) for name, value in change.items()}
    move = log_z_shift(model, model.constrain_params(thetas[0]), batch, estimates)[0]
    spread = lambda per_datum, rest: per_datum + rest / per_datum.shape[0]
    by_array = jax.vmap(lambda by: spread(*move(by)), out_axes=1)
    return spread(*move(change)), jax.vmap(by_array)(slope)
