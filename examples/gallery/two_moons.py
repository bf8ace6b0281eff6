r"""
An energy of data in the plane
==============================

An energy-based model without latents: the data themselves have the density
:math:`p(y) \propto \exp(-E(y))\, p_0(y)`, with a network for E. Walkers at several temperatures estimate the
gradient of the normaliser.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import linen as nn
from jax import random
from numpyro.contrib.module import flax_module
from sklearn.datasets import make_moons

from numpyro_ebipla import EBIPLA, EnergyPrior
from numpyro_ebipla.plots import plot_energy, plot_history

y, _ = make_moons(3000, noise=0.1, random_state=0)
y = (y - y.mean(0)).astype(np.float32)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (64, 64):
            x = nn.silu(nn.Dense(width)(x))
        return nn.Dense(1)(x)[..., 0]


def model(y, batch_size=None):
    energy = flax_module("energy", MLP(), input_shape=(2,))
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        seen = numpyro.subsample(y, event_dim=1)
        numpyro.sample("y", EnergyPrior(energy, dist.Normal(0, 1).expand([2]).to_event(1)), obs=seen)


fit = EBIPLA(model, num_steps=2000).run(random.key(0), y, batch_size=500, progress_bar=False)

# %%
# The landscape, and draws of it. The draws are annealed from the base, so that they do not depend on where the
# walkers of the fit happen to be.
prior = fit.energy_prior("y")
draws = prior.sample(random.key(1), (3000,))
fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
plot_energy(fit, ax=axes[0])
axes[1].scatter(*draws.T, s=2)
axes[1].set(title="draws of the fitted density", aspect="equal", xlim=(-2.5, 2.5), ylim=(-1.6, 1.6))
plt.show()

# %%
# The normaliser is known as well, so the density is a density. On a grid it integrates to one:
log_z = fit.log_normalizer("y")
grid = jnp.stack(jnp.meshgrid(*2 * [jnp.linspace(-4, 4, 400)]), -1)
total = float(jnp.exp(prior.log_prob(grid) - log_z.value).mean() * 8**2)
print(f"log Z = {log_z.value:.3f} ± {log_z.std_error:.3f}; the density integrates to {total:.3f}")

# %%
# Was the run sound? Acceptance of the moves, swaps between temperatures, and the safeguards, step by step.
plot_history(fit)
plt.show()

# %%
# What to try next
# ----------------
# - :doc:`/gallery/mixture_weights`, where the masses of modes are the question.
# - ``recipes.pcd(model)`` and ``recipes.cd(model)``: the same model by persistent or plain contrastive divergence.
