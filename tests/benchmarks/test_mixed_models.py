"""The growth curve beside nlme's is nlme's: the same likelihood at the same parameters."""

import numpy as np
import pytest
from numpyro import handlers
from scipy import stats

from benchmarks.mixed_models import __main__ as benchmark
from benchmarks.mixed_models.programs import PROGRAMS

#: Of nlme 3.1 on R's `Orange`, by maximum likelihood; the sizes are linear in the latents, so nothing is approximated.
FIXED, SD, SIGMA, LOG_LIK = np.array([191.05046, 722.5589, 344.17366]), 31.482552, 7.8462547, -131.58454


@pytest.mark.unit
def test_growth_has_nlmes_likelihood():
    model, args = PROGRAMS["orange"](benchmark.read("orange"))
    held = {"b": FIXED, "s": SD, "sigma": SIGMA}

    def mean(u):
        trace = handlers.trace(handlers.substitute(handlers.seed(model, 0), {**held, "u": u})).get_trace(*args)
        return np.float64(trace["y"]["fn"].loc)

    at_zero = mean(np.zeros(5))
    slopes = np.stack([mean(row) - at_zero for row in np.eye(5)], 1)
    cov = SD**2 * slopes @ slopes.T + SIGMA**2 * np.eye(35)
    found = stats.multivariate_normal(at_zero, cov).logpdf(np.float64(args[-1]))
    assert abs(found - LOG_LIK) < 2e-3, found  # the means are float32


@pytest.mark.unit
def test_rows_hold_what_was_found():
    out = {"fixed": [1.0, 22.97222], "errors": [0.25, 1], "sigma": 2.0, "log_lik": -3.14159, "seconds": 0.5}
    row = benchmark.row("pigs", "ebipla", out | {"likelihood_seconds": 1.25})
    assert row == ("pigs", "ebipla", "1, 22.97", "0.25, 1", "2", "-3.142", "0.50 (1.2)")
    assert "ebipla" in benchmark.systems("orange")
