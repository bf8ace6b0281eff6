"""Standard errors of the suite's mixed models, against the exact Hessian of their marginal likelihood."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from jax.flatten_util import ravel_pytree

from benchmarks.suite import cases
from numpyro_ebipla import EBIPLA

#: See tests/conftest.py.
RUNS_LONG = True
NAMES = [name for name in cases.NAMES if name.startswith("mixed_")]


def exact_covariance(case, fit):
    """Differences of the exact log likelihood in the unconstrained parameters, and the delta method."""
    model, step = fit.config.model, 0.1 / np.sqrt(np.diag(fit.draws.newton[1].astype(np.float64).sum(0).mean(0)))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), fit.params)
        free, unravel = ravel_pytree(model.unconstrain_params(wide))
        params_at = lambda v: model.constrain_params(unravel(v))
        jacobian = np.asarray(jax.jacfwd(lambda v: ravel_pytree(params_at(v))[0])(free))
        total = lambda v: case.value(jax.tree.map(np.asarray, params_at(free + v)))
        ways = np.diag(step)
        hessian = np.empty((len(step), len(step)))
        for i, a in enumerate(ways):
            for j, b in enumerate(ways[: i + 1]):
                four = total(a + b) - total(a - b) - total(b - a) + total(-a - b)
                hessian[i, j] = hessian[j, i] = four / (4 * step[i] * step[j])
    return jacobian @ np.linalg.inv(-hessian) @ jacobian.T


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype int64")  # of the groups that some models hold
@pytest.mark.parametrize("name", NAMES)
def test_standard_errors_are_exact(name):
    """Within 3 %, from a default run; numbers that cannot vary, such as those of a correlation matrix, have none."""
    case = cases.make(name)
    fit = EBIPLA(case.model).run(random.key(0), *case.args, progress_bar=False)
    found, exact = (np.sqrt(np.diag(c)) for c in (fit.covariance().value, exact_covariance(case, fit)))
    print(f"{name}: {len(fit.losses)} steps, ratio {np.round(found[exact > 0] / exact[exact > 0], 4)}")
    np.testing.assert_allclose(found, exact, rtol=0.03, atol=1e-12)
