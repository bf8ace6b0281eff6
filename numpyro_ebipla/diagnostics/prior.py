"""An energy prior judged by fresh draws of itself, annealed from the base, which no walker has had a part in."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from numpyro_ebipla._core.tree import spaced
from numpyro_ebipla.diagnostics.checks import Check, at_most
from numpyro_ebipla.model.energy import EnergyPrior
from numpyro_ebipla.smc.anneal import anneal, draw_equally
from numpyro_ebipla.smc.normaliser import Estimate, pooled

#: Populations of fresh draws, and draws of each.
POPULATIONS, POPULATION = 8, 1000
#: Draws of a kernel two-sample statistic, at most.
MAX_COMPARED = 1000


class Fresh(NamedTuple):
    """Populations annealed from the base: unconstrained draws ``[K, n, …]``, and log Z of all of them together."""

    draws: Array
    log_z: Estimate


@jax.jit
def fresh(prior: EnergyPrior, rng_key: Array) -> Fresh:
    """Anneal populations as the prior's own options say."""

    def one(key: Array) -> tuple[Array, Array, Array]:
        key_anneal, key_draw = random.split(key)
        out = anneal(key_anneal, prior.tilted(), max(prior.num_walkers, POPULATION), prior.annealing)
        return draw_equally(key_draw, out.position, out.log_weight, POPULATION), out.log_z, out.variance

    draws, log_z, variance = lax.map(one, random.split(rng_key, POPULATIONS))
    value, variance = pooled(log_z, variance)
    return Fresh(draws, Estimate(value, jnp.sqrt(variance)))


def flat_draws(fresh: Fresh) -> Array:
    """All of them in one: ``[K n, …]``."""
    return fresh.draws.reshape((-1, *fresh.draws.shape[2:]))


def of_prior(
    site: str,
    fresh: Fresh,
    log_z: float | None = None,
    walkers: Any = None,
    particles: Any = None,
) -> list[Check]:
    """Walkers and particles against fresh draws of the prior at the same parameters.

    Args:
        site: of the energy prior.
        fresh: see :func:`fresh`.
        log_z: by the walkers, None if they know none.
        walkers: ``[P, …]`` the strategy's own, unconstrained; None for priors with a normaliser for each datum.
        particles: ``[n, …]`` of the posteriors of all data, or the data; None if there are none.
    """
    error = float(np.max(fresh.log_z.std_error))
    verdicts = ("annealed populations agree", "annealed populations disagree: sample and log_normalizer are off, too")
    remedy = "EnergyPrior(…, annealing=Annealing(num_moves=160, stage_ess=0.98)) or more num_walkers"
    checks = [at_most(f"{site}: log Z, std error", error, 0.2, verdicts, remedy)]
    if walkers is None:
        return checks
    if log_z is not None:
        verdicts = ("walkers and fresh draws agree on log Z", "the walkers' log Z is off: the prior has gone wrong")
        off = abs(log_z - float(fresh.log_z.value.mean()))
        remedy = "more num_moves, num_walkers or num_rungs in prior=Tempered(…)"
        checks.append(at_most(f"{site}: log Z, walkers − fresh", off, 0.3, verdicts, remedy, 3 * error))
    draws = np.asarray(fresh.draws)
    noise = max(0.0, *(mmd2(draw, np.concatenate(np.delete(draws, i, 0))) for i, draw in enumerate(draws)))
    draws = np.concatenate(draws)
    verdicts = ("the walkers are draws of the prior", "the walkers are not draws of the prior")
    remedy = "more num_moves or num_rungs in prior=Tempered(…)"
    name = f"{site}: MMD², walkers − fresh"
    checks.append(at_most(name, mmd2(walkers, draws), 0.02, verdicts, remedy, slack=noise))
    if particles is not None:
        verdicts = ("the prior is where the posteriors are", "the prior is not where the posteriors are")
        name, remedy = f"{site}: MMD², particles − fresh", "more num_steps, or a more flexible energy"
        checks.append(at_most(name, mmd2(particles, draws), 0.02, verdicts, remedy, slack=noise))
    return checks


def mmd2(x: Any, y: Any) -> float:
    """Unbiased squared maximum mean discrepancy (Gretton et al., 2012, eq. 3) of ``[n, …]`` and ``[m, …]``.

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
    both -= both.mean(0)  # distances are differences of squares
    norm = jnp.sum(both**2, -1)
    distance = jnp.maximum(norm[:, None] + norm - 2 * both @ both.T, 0.0)
    width = jnp.mean(distance) + 1e-30
    kernel = jnp.exp(-distance / width)
    n = len(x)
    off_diagonal = lambda k: (k.sum() - jnp.trace(k)) / (len(k) * (len(k) - 1))
    return off_diagonal(kernel[:n, :n]) + off_diagonal(kernel[n:, n:]) - 2 * kernel[:n, n:].mean()
