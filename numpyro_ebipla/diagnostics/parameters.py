r"""How far from the maximum of the likelihood a run has ended, in nats per datum.

By Fisher's identity the particles know the slope of the log likelihood, and by Jensen's inequality a bound of what the
last steps have gained; both need ``log Z`` of energy priors, which fresh draws supply.
"""

from functools import partial

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
from numpyro_ebipla.training.collect import MAX_COORDINATES, Draws, slopes

#: Nats per datum that a settled run may have gained or left, and of the former what noise may hide. (What is left along
#: a direction without information, such as a rotation of factors, is hidden by any noise, and does no harm.)
SETTLED, HIDDEN = 0.005, 0.05

#: Ridge of the Fisher information where there are many data, against rounding.
RIDGE = 1e-6
#: Standard errors that a figure's noise is allowed for.
ERRORS = 2
GAINED = Rule(
    "nats still gained",
    SETTLED,
    "the last third of the run changed little",
    "the parameters were still moving",
    MORE_STEPS,
    most_slack=HIDDEN,
)
#: The same of all data together, where no data are independent: a fraction of a standard error of a parameter.
SETTLED_IN_ALL, HIDDEN_IN_ALL = 0.1, 1.0
GAINED_IN_ALL = Rule(
    "nats still gained, in all",
    SETTLED_IN_ALL,
    "the last steps changed little",
    "the parameters were still moving",
    MORE_STEPS,
    most_slack=HIDDEN_IN_ALL,
)
LEFT_IN_ALL = Rule(
    "nats to gain, in all",
    SETTLED_IN_ALL,
    "the parameters are where the likelihood is highest, within a fraction of their standard errors",
    "the likelihood still rises where the run ended",
    MORE_STEPS,
    most_slack=HIDDEN_IN_ALL,
)
#: Least curvature, in units of each parameter's own, of a direction of which the data know something.
LEAST_KNOWN = 1e-4
LEFT = Rule(
    "nats to gain",
    SETTLED,
    "the likelihood is level where the run ended",
    "the likelihood still rises in the direction of the run",
    f"{MORE_STEPS}, or a higher rate",
)


def check_parameters(
    model: LatentModel,
    thetas: tuple[Params, Params],
    last: Params,
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
        last: those of the last step, unconstrained.
        batch: data for which the normalisers of conditional priors are looked at: the first of ``chosen``.
        fresh: ``{energy site: draws}`` at the parameters reached.
        draws: of the particles, None without latents.
        num_particles: N.
        chosen: ``[M']`` the data of the draws.
    """
    if draws is not None and draws.newton is not None:
        slope, curvature = draws.newton
        return check_newton(slope, curvature, way_of(thetas[0], thetas[1], last))
    if draws is None:
        score = model.map_blocks(partial(model.compiled(data_score), thetas), batch, 1, chosen)
        score = np.asarray(score)
    else:
        score = draws.score
    change, shift = (
        map(np.asarray, model.compiled(normaliser_shifts)(thetas, batch, fresh)) if fresh else (np.zeros(1), None)
    )
    if score is None:
        assert draws is not None, "without draws there are scores"
        return [check_gain(draws.gain + change.mean() * model.num_data, model.num_data)]
    if shift is None:
        return check_score(score, num_particles)
    if any(model.energies[name].per_datum for name in fresh):  # then it is known of these data only
        shift = shift[:, : len(chosen)] if model.subsampled else shift[:, chosen]
        score = score[:, : shift.shape[1]]
    else:
        shift = shift.mean(1, keepdims=True)
    halves = np.stack([half.mean(0) for half in np.array_split(shift, 2)])
    shared = np.cov(shift.mean(1).T).reshape(shift.shape[-1], -1) / len(shift)
    return check_score(score + halves, num_particles, shared)


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


def way_of(params: Params, before: Params, last: Params) -> np.ndarray:
    """Return the way of the last steps ``[L]`` along the directions of :attr:`.Draws.newton`.

    It is the way from the average that is reported to the last step; if there is no average, or parameters are many,
    that from the slow average.
    """
    here, late, early = (np.asarray(ravel_pytree(tree)[0], float) for tree in (params, last, before))
    if here.size > MAX_COORDINATES:
        return np.ones(len(jax.tree.leaves(params)))
    return late - here if np.any(late != here) else here - early


def check_newton(slope: np.ndarray, curvature: np.ndarray, way: np.ndarray) -> list[Check]:
    """Check what the last steps gained, and what a Newton step would, in all, where global latents couple the data.

    What was gained is to second order. Of a Newton step, directions are left out in which the log likelihood is level
    or bends upwards, as that of a variance at zero.

    Args:
        slope: ``[P, L]`` at P of the draws, see :attr:`.Draws.newton`.
        curvature: ``[P, L, L]``.
        way: see :func:`way_of`.
    """
    slope, mean = slope.astype(np.float64), curvature.astype(np.float64).mean(0)
    mean = (mean + mean.T) / 2
    gained = abs(slope.mean(0) @ way) + 0.5 * max(way @ mean @ way, 0.0)
    spread = np.cov(slope.T).reshape(mean.shape) / len(slope) if len(slope) > 1 else np.full(mean.shape, np.inf)
    size = np.sqrt(np.abs(np.diag(mean)))
    scale = np.where(size > 0, size, 1.0)
    value, vector = np.linalg.eigh(mean / np.outer(scale, scale))
    whiten = vector[:, value > LEAST_KNOWN] / np.sqrt(value[value > LEAST_KNOWN]) / scale[:, None]
    halves = [half.mean(0) @ whiten for half in np.array_split(slope, 2)]
    left, noise = 0.5 * halves[0] @ halves[-1], whiten.T @ spread @ whiten
    # Of half the product of two independent means; each has twice the noise of both together.
    error = np.sqrt(np.sum(noise**2) + 2 * max(left, 0.0) * np.trace(noise))
    return [
        GAINED_IN_ALL.judge(gained, slack=ERRORS * float(np.sqrt(way @ spread @ way))),
        LEFT_IN_ALL.judge(left, slack=ERRORS * float(error)),
    ]


def check_score(score: np.ndarray, num_particles: int, shared: np.ndarray | float = 0.0) -> list[Check]:
    """Check what the last third of the run was worth, and what is left in its direction, in nats per datum.

    The score of each datum is the posterior mean of that of ``log p_θ(x, y)`` (Fisher's identity); its mean is the
    slope of the log likelihood, its covariance the Fisher information. Both are known along as many directions as there
    are parameter arrays: what is left, half the Newton decrement, is a lower bound for the whole space, and all there
    is for scalars. What was gained is to second order. Two halves of the particles tell the noise of their means.

    Args:
        score: ``[2, M', L]``, see :attr:`.Draws.score`, with log normalisers.
        num_particles: N.
        shared: ``[L, L]`` covariance of an error of the mean score that all data share.
    """
    score = score.astype(np.float64)
    shared = np.broadcast_to(shared, (score.shape[-1],) * 2)
    along = score.sum(-1)
    gained, gained_noise = along.mean() + 0.5 * _common(along), _noise(along[..., None])[0, 0] + shared.sum()
    gained_error = np.sqrt(gained_noise)
    scale = score.mean(0).std(0)
    known = scale > 0
    score, shared = score[:, :, known] / scale[known], shared[known][:, known] / np.outer(scale[known], scale[known])
    num, moving = score.shape[1:]
    first, second = score.mean(1)
    fisher, noise = _information(score), _noise(score) + shared
    fisher += (RIDGE + moving / num) * np.eye(moving)  # few data know little of many directions
    left, noise = 0.5 * first @ np.linalg.solve(fisher, second), np.linalg.solve(fisher, 2 * noise)
    # Of half the product of two independent means; each has twice the noise of both together.
    left_error = 0.5 * np.sqrt(np.trace(noise @ noise) + 4 * max(left, 0.0) * np.trace(noise))
    slack = 3 * np.sqrt(moving) / (num * num_particles)  # thrice what the particles' noise leaves at the maximum
    return [
        GAINED.judge(gained, slack=slack + ERRORS * gained_error),
        LEFT.judge(left, slack=slack + ERRORS * left_error),
    ]


def _common(halves: np.ndarray) -> float:
    """Return the variance over the data ``[2, M']`` that both halves agree on: noise is not information."""
    first, second = halves - halves.mean(1, keepdims=True)
    return float((first * second).mean())


def _information(halves: np.ndarray) -> np.ndarray:
    """Return the same of ``[2, M', L]`` as a matrix ``[L, L]``, with what one standard error may add."""
    first, second = halves - halves.mean(1, keepdims=True)
    num = len(first)
    value, vector = np.linalg.eigh((first.T @ second + second.T @ first) / (2 * num))
    return vector * np.maximum(value, 0) @ vector.T + np.sqrt(num) * _noise(halves)


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
