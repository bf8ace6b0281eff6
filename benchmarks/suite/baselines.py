"""What one would run instead, judged by the same exact likelihood: NumPyro's SVI, and the paper's unadjusted EBIPLA."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpyro
from jax import lax, random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from benchmarks.suite.case import Case, Rival
from numpyro_ebipla import EBIPLA, ULA, ModelError, langevin, recipes
from numpyro_ebipla._core.state import TrainState

SVI_STEPS = 5000
#: Latent numbers for which a guide with a full covariance is tried.
FULL_COVARIANCE = 1000
#: The paper's steps, as fractions of 2 × the smallest posterior variance, above which ULA diverges on a normal target;
#: each for a trial, and the best of them for the rest.
FRACTIONS, TRIAL_STEPS, ALL_STEPS = (0.5, 0.1, 0.02), 500, 5000
#: Of unadjusted EBIPLA, as many as the default has.
NUM_PARTICLES = 4


def svi(case: Case, seed: int) -> dict[str, Any]:
    """SVI by Adam with a falling rate, with the case's guide, or the better of the two that fit any model."""
    rival = case.rival or Rival(case.model, None, case.value)
    latents = case.num_data * np.size(case.posterior(case.best, np.arange(1))[0]) if case.best else np.inf
    guides = {"encoder": rival.guide} if rival.guide else {"mean field": AutoNormal(rival.model)}
    if not rival.guide and latents <= FULL_COVARIANCE:
        guides["full covariance"] = AutoMultivariateNormal(rival.model)
    rate = lambda step: 1e-2 / (1 + step / 1000) ** 0.5
    elbo = Trace_ELBO(num_particles=1 if case.kwargs.get("batch_size") else 10)  # minibatches are the larger noise
    start, tried = time.perf_counter(), {}
    for name, guide in guides.items():
        system = SVI(rival.model, guide, numpyro.optim.Adam(rate), elbo)
        fit = system.run(random.key(seed), SVI_STEPS, *case.args, progress_bar=False, **case.kwargs)
        tried[name] = _excess(case, rival.value, fit.params)
    best = min(tried, key=tried.get)
    return {"excess": tried[best], "guide": best, "tried": tried, "seconds": time.perf_counter() - start}


def unadjusted(case: Case, seed: int, smallest_variance: float) -> dict[str, Any]:
    """``recipes.ebipla``, or without an energy the same system less its walkers, at the best of some fixed steps."""
    start, tried, reached = time.perf_counter(), {}, {}
    for fraction in FRACTIONS:
        system, state = _paper(case, seed, 2 * fraction * smallest_variance)
        walk = _walk(case, system)
        state, tried[fraction] = walk(state, TRIAL_STEPS)
        reached[fraction] = walk, state
    best = min(tried, key=tried.get)
    walk, state = reached[best]
    _, excess = walk(state, ALL_STEPS - TRIAL_STEPS) if np.isfinite(tried[best]) else (state, np.inf)
    seconds = time.perf_counter() - start
    return {"excess": excess, "fraction": best, "after_trial": tried, "seconds": seconds}


def _paper(case: Case, seed: int, step_size: float) -> tuple[EBIPLA, TrainState]:
    init = lambda system: (system, system.init(random.key(seed), *case.args, **case.kwargs))
    try:
        return init(recipes.ebipla(case.model, step_size=step_size, num_particles=NUM_PARTICLES))
    except ModelError:  # no energy prior, or one that persistent walkers cannot serve
        how = dict(kernel=ULA(step_size), optim=langevin(step_size), averaging=None, num_particles=NUM_PARTICLES)
        return init(EBIPLA(case.model, **how))


def _walk(case: Case, system: EBIPLA) -> Callable[[TrainState, int], tuple[TrainState, float]]:
    """So many steps, and the excess that they reach (infinite if one was not finite): ``run`` less its draws."""

    @jax.jit
    def steps(state: TrainState, num: int, args: tuple) -> TrainState:
        return lax.fori_loop(0, num, lambda _, s: system.update(s, *args, **case.kwargs)[0], state)

    def walk(state: TrainState, num: int) -> tuple[TrainState, float]:
        after = steps(state, num, case.args)
        params = system.get_params(after, *case.args, **case.kwargs)
        return after, _excess(case, case.value, params) if after.step == state.step + num else np.inf

    return walk


def _excess(case: Case, value: Any, params: Any) -> float:
    with np.errstate(all="ignore"):
        found = case.optimum - value(params)
    return float(found) if np.isfinite(found) else float("inf")
