"""An energy prior judged by fresh draws of itself, annealed from the base, which no walker has had a part in."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from numpyro_ebipla._core.convolutions import with_fast_convolutions
from numpyro_ebipla._core.tree import spaced
from numpyro_ebipla.diagnostics.checks import Check, Rule
from numpyro_ebipla.model.energy import EnergyPrior
from numpyro_ebipla.smc.anneal import anneal, draw_equally
from numpyro_ebipla.smc.normaliser import Estimate, pooled

#: Populations of fresh draws, and draws of each.
POPULATIONS, POPULATION = 8, 1000
#: Draws of a kernel two-sample statistic, at most.
MAX_COMPARED = 1000

#: Squared MMD below which two sets of draws are alike: a shift by a third of a standard deviation in one dimension.
ALIKE = 0.02
POPULATIONS_AGREE = Rule(
    "log Z, std error",
    0.2,
    "annealed populations agree",
    "annealed populations disagree: sample and log_normalizer are off, too",
    "EnergyPrior(…, annealing=Annealing(num_moves=160, stage_ess=0.98)) or more num_walkers",
)
LOG_Z = Rule(
    "log Z, walkers − fresh",
    0.3,
    "walkers and fresh draws agree on log Z",
    "the walkers' log Z is off: the prior has gone wrong",
    "more num_moves, num_walkers or num_rungs in prior=Tempered(…)",
)
WALKERS = Rule(
    "MMD², walkers − fresh",
    ALIKE,
    "the walkers are draws of the prior",
    "the walkers are not draws of the prior",
    "more num_moves or num_rungs in prior=Tempered(…)",
)
PARTICLES = Rule(
    "MMD², particles − fresh",
    ALIKE,
    "the prior is where the posteriors are",
    "the prior is not where the posteriors are",
    "more num_steps, or a more flexible energy",
)


class FreshDraws(NamedTuple):
    """Populations annealed from the base: unconstrained draws ``[K, n, …]``, and log Z of all of them together."""

    draws: Array
    log_z: Estimate


@jax.jit
@with_fast_convolutions
def draw_fresh(prior: EnergyPrior, rng_key: Array) -> FreshDraws:
    """Anneal populations as the prior's own options say."""

    def one(key: Array) -> tuple[Array, Array, Array]:
        key_anneal, key_draw = random.split(key)
        out = anneal(key_anneal, prior.tilted(), max(prior.num_walkers, POPULATION), prior.annealing)
        return draw_equally(key_draw, out.position, out.log_weight, POPULATION), out.log_z, out.variance

    draws, log_z, variance = lax.map(one, random.split(rng_key, POPULATIONS))
    value, variance = pooled(log_z, variance)
    return FreshDraws(draws, Estimate(value, jnp.sqrt(variance)))


def flat_draws(fresh: FreshDraws) -> Array:
    """Return the draws of all populations in one: ``[K n, …]``."""
    return fresh.draws.reshape((-1, *fresh.draws.shape[2:]))


def check_prior(
    site: str,
    fresh: FreshDraws,
    log_z: float | None = None,
    walkers: Any = None,
    particles: Any = None,
) -> list[Check]:
    """Check walkers and particles against fresh draws of the prior at the same parameters.

    Args:
        site: of the energy prior.
        fresh: see :func:`draw_fresh`.
        log_z: by the walkers, None if they know none.
        walkers: ``[P, …]`` the strategy's own, unconstrained; None for priors with a normaliser for each datum.
        particles: ``[n, …]`` of the posteriors of all data, or the data; None if there are none.
    """
    error = float(np.max(fresh.log_z.std_error))
    checks = [POPULATIONS_AGREE.judge(error, site)]
    if walkers is None:
        return checks
    if log_z is not None:
        off = abs(log_z - float(fresh.log_z.value.mean()))
        checks.append(LOG_Z.judge(off, site, slack=3 * error))
    draws = np.asarray(fresh.draws)
    noise = max(0.0, *(mmd2(draw, np.concatenate(np.delete(draws, i, 0))) for i, draw in enumerate(draws)))
    draws = np.concatenate(draws)
    checks.append(WALKERS.judge(mmd2(walkers, draws), site, slack=noise))
    if particles is not None:
        checks.append(PARTICLES.judge(mmd2(particles, draws), site, slack=noise))
    return checks


def mmd2(x: Any, y: Any) -> float:
    """Return the unbiased squared maximum mean discrepancy (Gretton et al., 2012, eq. 3) of ``[n, …]`` and ``[m, …]``.

    The kernel is ``exp(−r² / w)`` with the mean squared distance for ``w``, so the scale does not matter: in one
    dimension it is 0.18 for normals whose means are one standard deviation apart. Of more than 1000 draws evenly spaced
    ones are taken.

    >>> x = np.random.default_rng(0).normal(size=(2, 500, 3))
    >>> abs(mmd2(*x)) < 0.005, mmd2(x[0], x[1] + 1) > 0.1
    (True, True)
    """
    flat = lambda a: jnp.asarray(np.reshape(a, (len(a), -1))[spaced(len(a), MAX_COMPARED)])
    return float(_mmd2(flat(x), flat(y)))


@jax.jit
def _mmd2(x: Array, y: Array) -> Array:
    both = jnp.concatenate([x, y])
    both -= both.mean(0, keepdims=True)  # distances are differences of squares
    norm = jnp.sum(both**2, -1)
    distance = jnp.maximum(norm[:, None] + norm[None] - 2 * both @ both.T, 0.0)
    width = jnp.mean(distance) + 1e-30  # draws that are all the same are alike
    kernel = jnp.exp(-distance / width)
    n = len(x)
    off_diagonal = lambda k: (k.sum() - jnp.trace(k)) / (len(k) * (len(k) - 1))
    return off_diagonal(kernel[:n, :n]) + off_diagonal(kernel[n:, n:]) - 2 * kernel[:n, n:].mean()
