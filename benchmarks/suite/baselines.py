"""What one would run instead, judged by the same exact likelihood: NumPyro's SVI, and the paper's unadjusted EBIPLA."""

import time
import warnings
from typing import Any

import numpy as np
import numpyro
from jax import random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from benchmarks.suite.case import Case, Rival
from numpyro_ebipla import EBIPLA, ULA, ModelError, langevin, recipes

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
    start, best = time.perf_counter(), None
    tried = {}
    for fraction in FRACTIONS:
        system = _paper(case, 2 * fraction * smallest_variance)
        run = lambda steps, state=None, system=system: system.run(
            random.key(seed), *case.args, num_steps=steps, init_state=state, progress_bar=False, **case.kwargs
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it diverged is in the figure
            fit = run(TRIAL_STEPS)
        tried[fraction] = np.inf if fit.stopped else _excess(case, case.value, fit.params)
        if best is None or tried[fraction] < tried[best[0]]:
            best = fraction, run, fit
    fraction, run, fit = best
    if np.isfinite(tried[fraction]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit = run(ALL_STEPS - TRIAL_STEPS, fit.state)
    excess = np.inf if fit.stopped else _excess(case, case.value, fit.params)
    seconds = time.perf_counter() - start
    return {"excess": excess, "fraction": fraction, "after_trial": tried, "seconds": seconds}


def _paper(case: Case, step_size: float) -> EBIPLA:
    options = dict(num_particles=NUM_PARTICLES, num_samples=1, warmup=0, thinning=1)
    try:
        system = recipes.ebipla(case.model, step_size=step_size, **options)
        system.init(random.key(0), *case.args, **case.kwargs)
    except ModelError:  # no energy prior, or one that persistent walkers cannot serve
        move = langevin(step_size)
        system = EBIPLA(case.model, kernel=ULA(step_size), optim=move, averaging=None, **options)
    return system


def _excess(case: Case, value: Any, params: Any) -> float:
    with np.errstate(all="ignore"):
        found = case.optimum - value(params)
    return float(found) if np.isfinite(found) else float("inf")
