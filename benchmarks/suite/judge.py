"""One default fit, judged by the exact likelihood and the exact posterior at its own parameters."""

import time
import warnings
from typing import Any

import numpy as np
from jax import random
from numpyro.diagnostics import effective_sample_size

from benchmarks.suite.case import Case
from numpyro_ebipla import EBIPLA

#: Posterior sds that the particles may be off, and the standard errors of their draws that are allowed on top: among
#: 200 right figures the largest is beyond 3.5 about once in 10 times. One above ``LARGEST_SE`` is no excuse,
#: as chains that are stuck have a large one: it is that of an effective sample size of 400, and four particles, the
#: fewest there are by default, have 800 draws.
POSTERIOR_THRESHOLD, ALLOWED, LARGEST_SE = 0.1, 3.5, 0.05
#: Standard errors that a parameter may be from the optimum.
MOST_OFF = 0.05


def run(case: Case, seeds: int) -> list[dict[str, Any]]:
    """Fits with one object, so that the later ones compile nothing; the first seed's seconds include it."""
    ebipla = EBIPLA(case.model)
    return [judged(case, ebipla, seed) for seed in range(seeds)]


def judged(case: Case, ebipla: EBIPLA, seed: int) -> dict[str, Any]:
    """What is reported about a run, as JSON has it; ``params`` under their own key."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start, cpu = time.perf_counter(), time.process_time()
        everything = {"indices": np.arange(case.num_data)} if case.kwargs else {}  # minibatches' draws are of some data
        fit = ebipla.run(random.key(seed), *case.args, progress_bar=False, **everything, **case.kwargs)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        diagnosis = None if fit.stopped and not fit.arrived else fit.diagnostics()
    excess = case.optimum - case.value(fit.params)
    draws = fit.get_samples()[case.site]
    errors, frozen = posterior_errors(case, fit.params, draws), frozen_chains(draws)
    right = max(errors["mean"], errors["log_sd"]) <= POSTERIOR_THRESHOLD and frozen == 0
    off = case.off(fit.params) if case.off else 0.0
    met = excess <= case.threshold and right and off <= MOST_OFF
    return {
        "seed": seed,
        "excess": float(excess),
        "in_all": float(excess) * (1 if case.off else case.num_data),
        "off": off,
        "posterior": errors,
        "frozen": frozen,
        "met": bool(met),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "steps": len(fit.losses),
        "particles": fit.num_chains,
        "stopped": fit.stopped,
        "warnings": [str(w.message) for w in caught],
        "alarms": diagnosis and {check.name: check.value for check in diagnosis.checks if not check.passed},
        "extra": case.extra(fit.params) if case.extra else {},
        "params": fit.params,
    }


def frozen_chains(draws: np.ndarray) -> int:
    """Chains, of any datum, whose draws ``[particle, draw, datum, ...]`` are all the same: no sample of a posterior."""
    return int((draws == draws[:, :1]).all(1).sum())


def posterior_errors(case: Case, params: Any, draws: np.ndarray) -> dict[str, float]:
    """Errors of the draws' means and log sds in posterior sds, the worst over the compared latents.

    ``mean`` and ``log_sd`` are what the Monte Carlo error of the draws cannot explain: the largest excess over
    ``ALLOWED`` standard errors. ``raw_…`` are the largest errors, ``se_…`` the largest standard errors, from the
    effective sample size of each latent's chains. ``rms_…`` are over all latents, less the mean squared standard error:
    a common bias shows there long before it does in one latent.
    """
    indices = case.compared()
    mean, sd = case.posterior(params, indices)
    if not np.all(sd > 0) or not np.all(np.isfinite(draws)):
        names = (prefix + k for prefix in ("", "raw_", "se_", "rms_") for k in ("mean", "log_sd"))
        return dict.fromkeys(names, float("inf"))
    z = (np.asarray(draws, np.float64)[:, :, indices] - mean) / sd
    centred = (z - z.mean((0, 1))) ** 2
    variance = centred.mean((0, 1))
    se_mean = np.sqrt(variance / effective_sample_size(z))
    # The delta method: an error e of the variance is one of e / (2 · variance) of the log sd.
    se_log_sd = centred.std((0, 1)) / np.sqrt(effective_sample_size(centred)) / (2 * variance)
    found = {}
    for name, error, se in (("mean", z.mean((0, 1)), se_mean), ("log_sd", 0.5 * np.log(variance), se_log_sd)):
        found[name] = float(np.maximum(np.abs(error) - ALLOWED * np.minimum(se, LARGEST_SE), 0).max())
        found[f"raw_{name}"] = float(np.abs(error).max())
        found[f"se_{name}"] = float(se.max())
        found[f"rms_{name}"] = float(np.sqrt(max((error**2).mean() - (se**2).mean(), 0)))
    return found
