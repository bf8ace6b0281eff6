r"""
A prior that depends on a covariate
===================================

The law of a latent splits in two as a covariate grows. An energy :math:`E(x, c)` learns its whole shape, not only a
mean and a variance; each covariate has a normaliser of its own.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import linen as nn
from jax import random
from numpyro.contrib.module import flax_module

from numpyro_ebipla import EBIPLA, EnergyPrior

NOISE = 0.3
c = random.uniform(random.key(0), (2000,), minval=-1, maxval=1)
side = jnp.where(random.bernoulli(random.key(1), 0.5, c.shape), 1.0, -1.0)
latent = side * 2 * jnp.maximum(c, 0) + 0.3 * random.normal(random.key(2), c.shape)
y = latent + NOISE * random.normal(random.key(3), c.shape)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.silu(nn.Dense(64)(x)))[..., 0]


def model(c, y, batch_size=None):
    net = flax_module("energy", MLP(), input_shape=(2,))
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        c, y = (numpyro.subsample(v, event_dim=0) for v in (c, y))
        energy = lambda x: net(jnp.stack(jnp.broadcast_arrays(x, c), -1))
        x = numpyro.sample("x", EnergyPrior(energy, dist.Normal(0, 2)))
        numpyro.sample("y", dist.Normal(x, NOISE), obs=y)


fit = EBIPLA(model, num_steps=2000).run(random.key(4), c, y, batch_size=250, progress_bar=False)

# %%
# The fitted prior, normalised in each column on a grid, beside the one that made the data.
at, x = np.linspace(-1, 1, 80), np.linspace(-4, 4, 200)
pairs = jnp.asarray(np.stack(np.meshgrid(x, at), -1), jnp.float32)
log_density = -MLP().apply({"params": fit.params["energy$params"]}, pairs) + dist.Normal(0, 2).log_prob(pairs[..., 0])
fitted = np.exp(log_density - log_density.max(1, keepdims=True))
fitted /= fitted.sum(1, keepdims=True) * (x[1] - x[0])
middle = 2 * np.maximum(at, 0)[:, None]
truth = sum(0.5 * np.exp(-0.5 * np.square((x - s * middle) / 0.3)) / (0.3 * np.sqrt(2 * np.pi)) for s in (-1, 1))
fig, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharex=True, sharey=True, layout="constrained")
axes[0].scatter(c, y, s=2)
axes[0].set(title="data", xlabel="covariate", ylabel="y or latent")
for ax, density, title in zip(axes[1:], (fitted, truth), ("fitted prior", "the prior that made them"), strict=True):
    image = ax.pcolormesh(at, x, density.T, vmin=0, vmax=1.4, rasterized=True)
    ax.set(title=title, xlabel="covariate", ylim=(-3.5, 3.5))
fig.colorbar(image, ax=axes, label="density")
plt.show()

# %%
# What to try next
# ----------------
# - A normal prior whose mean and scale are networks of the covariate: what does :func:`.compare` say?
# - Covariates of several dimensions, such as a class: see :doc:`/models`.
