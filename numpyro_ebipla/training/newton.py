r"""How far the parameters are from the maximum of the likelihood, as particles tell on the way.

From time to time the slope g and the curvature I of the log likelihood are taken from the particles where they stand
(:mod:`numpyro_ebipla.training.information`). Each look knows the maximum, θ + I⁻¹ g, but for noise, and many together
know what a parameter vector leaves to be gained, ½ (θ* − θ)ᵀ I (θ* − θ), and how well.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Latents, Params, TrainState
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.particles.persistent import Particles
from numpyro_ebipla.smc.control import fields_of, quiet_sites
from numpyro_ebipla.training.config import Config
from numpyro_ebipla.training.information import (
    ERRORS,
    LEAST_KNOWN,
    by_coordinate,
    num_directions,
    slope_and_curvature,
)

#: Steps between two looks, and before the first. A look costs about as much as five steps where there are three
#: parameters, and as twenty where there are thirty.
LOOK_EVERY, LOOK_FROM = 50, 200
#: Looks in a row that saw no maximum double the wait for the next one, up to so many times: factors that may be rotated
#: have none to see.
PATIENCE = 8
#: Nats of all data together that a run leaves: with one parameter, 0.03 of its standard errors.
GAIN = 5e-4
#: What is said of a run that ended so begins with this.
ARRIVED = "arrived"
#: Looks that a verdict goes by, at least; it goes by those of the last half of the run.
FEWEST_LOOKS = 6


def log_density_at(model: LatentModel, batch: Batch) -> Callable[[Latents, Params], Array]:
    """Return the log density of particles at unconstrained parameters, ``[N]``, or ``[N, B]`` of independent data."""

    def log_density(latents: Latents, theta: Params) -> Array:
        joint = model.log_joint(model.constrain_params(theta), *latents, batch, {})
        if model.independent_data:  # a penalty of the parameters is shared by all data
            return joint.per_datum + joint.rest[:, None] / model.num_data
        return joint.per_datum.sum(-1) + joint.rest

    return log_density


def newton_of_block(
    model: LatentModel, thetas: tuple[Params, Params], latents: Latents, batch: Batch
) -> tuple[Array, Array]:
    """Return slope ``[L]`` and curvature ``[L, L]`` of the log likelihood of a block of data, from particles.

    Args:
        model: the model.
        thetas: the parameters and those they come from, unconstrained; see :func:`.go_along`.
        latents: particles of the posterior at the former.
        batch: the data.
    """
    return slope_and_curvature(log_density_at(model, batch), latents, *thetas)


def look_at(model: LatentModel, state: TrainState, data: Any) -> tuple[Array, Array]:
    """Return slope and curvature from a state's particles, by the program that judges the draws, too."""
    batch = Batch(None, data, state.rng_key, state.mutable)
    return model.compiled(newton_of_block)((state.params, state.slow_average), state.posterior.latents, batch)


def is_known(config: Config, params: Params, shapes: Callable[[], TrainState]) -> bool:
    """Return whether looks know the likelihood's slope and curvature, in all parameters and from all data.

    That takes few parameters, persistent particles of an adjusted kernel, as many as their control variates need, all
    data in each step and no energy prior, of whose log Z walkers know less.

    Args:
        config: of the steps.
        params: like those of the state.
        shapes: of a state.
    """
    model, particles = config.model, config.particles
    quiet = isinstance(particles, Particles) and particles.quiet and particles.kernel.adjusted
    if not quiet or not model.latents or model.energies or model.subsampled:
        return False
    if not num_directions(params) or not by_coordinate(params):
        return False
    return fields_of(*quiet_sites(shapes().posterior.latents)) is not None


def watch_for(config: Config, params: Params, shapes: Callable[[], TrainState], gain: float | bool) -> "Watch | None":
    """Return what ends a run where going on would gain fewer nats, of all data together, than ``gain``.

    Args:
        config: see :func:`is_known`.
        params: likewise.
        shapes: likewise.
        gain: True stands for :data:`GAIN` where it is known, and for all steps elsewhere, as False does.

    Raises:
        ModelError: for a number, if what going on would gain is not known.
    """
    if gain is False or not is_known(config, params, shapes):
        if isinstance(gain, bool):
            return None
        raise ModelError(
            "stop_at_gain: what going on would gain is not known here: it takes at most 32 parameters, latents without "
            "energy priors or minibatches, and the default kernel. Leave it out, or use stop_at_r_hat or num_steps."
        )
    return Watch(config, GAIN if gain is True else gain)


class Looks(NamedTuple):
    """What the looks of a run have found; all in float64.

    Attributes:
        step: ``[n]`` steps taken.
        best: ``[n, L]`` where the maximum is, by each; NaN where the curvature is none of a maximum.
        curvature: ``[n, L, L]``.
    """

    step: np.ndarray
    best: np.ndarray
    curvature: np.ndarray

    @staticmethod
    def one(step: int, params: Params, slope: Array, curvature: Array) -> "Looks":
        """Return a single look, at unconstrained parameters."""
        g, found = np.asarray(slope, np.float64), np.asarray(curvature, np.float64)
        found = (found + found.T) / 2
        best = flat(params) + np.linalg.solve(found, g) if is_maximum(found) else np.full(len(g), np.nan)
        return Looks(np.array([float(step)]), best[None], found[None])

    def gain(self, params: Params, done: int) -> tuple[float, float]:
        """Return how many nats of all data these parameters leave to be gained, and the standard error of that.

        By the looks of the last half of the ``done`` steps; both are infinite if one of these saw no maximum, or they
        are too few. Of a mean of n looks whose covariance is C, ``tr(I C)/(2 n)`` is noise, and no gain.
        """
        late = self.step > min(done / 2, done - FEWEST_LOOKS * LOOK_EVERY)
        best, number = self.best[late], late.sum()
        if number < FEWEST_LOOKS or not np.isfinite(best).all():
            return np.inf, np.inf
        curvature = self.curvature[late].mean(0)
        off = best.mean(0) - flat(params)
        noise = curvature @ np.cov(best.T).reshape(curvature.shape) / number
        value = 0.5 * (off @ curvature @ off - np.trace(noise))
        error = np.sqrt(off @ noise @ curvature @ off + 0.5 * np.trace(noise @ noise))
        return float(value), float(error)


def is_maximum(curvature: np.ndarray) -> bool:
    """Return whether minus the second derivatives, in units of each parameter's own, are all known to be positive."""
    own = np.diag(curvature)
    if not np.isfinite(curvature).all() or np.any(own <= 0):
        return False
    return bool(np.linalg.eigvalsh(curvature / np.sqrt(np.outer(own, own)))[0] > LEAST_KNOWN)


def flat(params: Params) -> np.ndarray:
    """Return unconstrained parameters ``[L]``."""
    return np.asarray(ravel_pytree(params)[0], np.float64)


def is_due(looks: list[Looks], done: int) -> bool:
    """Return whether to look after ``done`` steps, by the looks so far.

    >>> seen = lambda *steps: [Looks(np.array([k]), np.full((1, 2), np.nan), np.eye(2)[None]) for k in steps]
    >>> is_due([], 150), is_due([], 200), is_due(seen(200), 250), is_due(seen(200), 300), is_due(seen(200, 300), 400)
    (False, True, False, True, False)
    """
    if done % LOOK_EVERY or done < LOOK_FROM:
        return False
    if not looks:
        return True
    known = np.isfinite(np.concatenate([look.best[:, 0] for look in looks]))
    in_vain = np.argmax(known[::-1]) if known.any() else len(known)
    return bool(done - looks[-1].step[-1] >= LOOK_EVERY * min(2 ** int(in_vain), PATIENCE))


class Watch(NamedTuple):
    """What ends a run that has arrived.

    Attributes:
        config: of its steps.
        limit: nats of all data together that going on may gain.
    """

    config: Config
    limit: float

    def look(self, done: int, state: TrainState, data: Any) -> Looks:
        """Look at the likelihood."""
        return Looks.one(done, state.params, *look_at(self.config.model, state, data))

    def verdict(self, looks: Looks, state: TrainState, done: int) -> str | None:
        """Return why the run is over after ``done`` steps, or None while it is not known to be."""
        gain, error = looks.gain(self.config.estimate(state), done)
        if not gain + ERRORS * error <= self.limit:
            return None
        return f"{ARRIVED} after {done} steps: going on would gain {max(gain, 0.0):.1g} nats in all, ± {error:.1g}"
