"""
A Bayesian neural network with its prior learned
================================================

The weights of a small network are global latents. The scale of its output and the noise are parameters, fitted by
marginal likelihood, which is often called empirical Bayes: nothing is left to tune by cross-validation.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro.infer import Predictive

from numpyro_ebipla import EBIPLA

x = jnp.concatenate([jnp.linspace(-1, -0.3, 40), jnp.linspace(0.2, 1, 40)])[:, None]
y = jnp.sin(6 * x[:, 0]) + 0.1 * random.normal(random.key(0), (len(x),))


def model(x, y=None):
    scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
    noise = numpyro.param("noise", 1.0, constraint=dist.constraints.positive)
    w1 = numpyro.sample("w1", dist.Normal(0, 5).expand([1, 20]).to_event(2))
    b1 = numpyro.sample("b1", dist.Normal(0, 2).expand([20]).to_event(1))
    w2 = numpyro.sample("w2", dist.Normal(0, scale / 20**0.5).expand([20]).to_event(1))
    mean = numpyro.deterministic("mean", jnp.tanh(x @ w1 + b1) @ w2)
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(mean, noise), obs=y)


# %%
# The run warns, and rightly: hidden units may be exchanged, and each particle stays with the weights that it has found.
# So the particles are an ensemble of networks, each a sample of its own mode, and standard errors are not to be had.
fit = EBIPLA(model).run(random.key(1), x, y, progress_bar=False)
print({name: round(float(value), 3) for name, value in fit.params.items()})

# %%
# Where there are no data the networks differ.
grid = jnp.linspace(-1.5, 1.5, 200)[:, None]
weights = {name: fit.get_samples(group_by_chain=False)[name][::50] for name in ("w1", "b1", "w2")}
mean = np.asarray(Predictive(model, weights, params=fit.params)(random.key(2), grid)["mean"])
fig, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
low, high = np.quantile(mean, [0.05, 0.95], axis=0)
ax.fill_between(grid[:, 0], low, high, alpha=0.25, label="90 % of the networks")
ax.plot(grid[:, 0], mean[:: len(mean) // 8].T, lw=0.7, color="C0")
ax.plot(grid[:, 0], jnp.sin(6 * grid[:, 0]), "k:", label="truth")
ax.plot(x[:, 0], y, "k.", ms=4, label="data")
ax.set(ylim=(-2.5, 2.5), xlabel="x", ylabel="y")
ax.legend(loc="upper right")
plt.show()

# %%
# What to try next
# ----------------
# - One scale for all weights: which has the higher likelihood?
# - A larger network: steps cost more, and :meth:`.Fit.diagnostics` says whether the particles mix.
