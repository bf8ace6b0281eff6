r"""
A roll hidden in ten dimensions
===============================

Data with a simple shape are rotated into ten dimensions and blurred by noise. A linear decoder finds the plane, and an
energy prior finds the shape in it.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import linen as nn
from jax import random
from numpyro.contrib.module import flax_module
from numpyro.infer import Predictive

from numpyro_ebipla import EBIPLA, EnergyPrior
from numpyro_ebipla.plots import plot_energy

angle = random.uniform(random.key(0), (4000, 1), minval=4.7, maxval=14.1)
roll = angle / 7 * jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], 1)
rotation = random.normal(random.key(1), (2, 10))
y = roll @ rotation + 0.1 * random.normal(random.key(2), (4000, 10))

# %%
# The model
# ---------
# The prior of the two latents is :math:`p(x) \propto \exp(-E(x))\, p_0(x)`: a small network E over a standard normal
# base. All parameters are fitted by maximum marginal likelihood. There is no encoder.


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (128, 128):
            x = nn.silu(nn.Dense(width)(x))
        return nn.Dense(1)(x)[..., 0]


def model(y=None, num_data=2000, batch_size=None):
    energy = flax_module("energy", MLP(), input_shape=(2,))
    decoder = flax_module("decoder", nn.Dense(10), input_shape=(2,))
    with numpyro.plate("data", num_data if y is None else len(y), subsample_size=batch_size):
        x = numpyro.sample("x", EnergyPrior(energy, dist.Normal(0, 1).expand([2]).to_event(1)))
        seen = None if y is None else numpyro.subsample(y, event_dim=1)
        numpyro.sample("y", dist.Normal(decoder(x), 0.1).to_event(1), obs=seen)


fit = EBIPLA(model, num_steps=3000).run(random.key(3), y, batch_size=500, progress_bar=False)
fit.print_summary()

# %%
# What it has learned
# -------------------
# Left: the energy in the latent plane, low where the prior is high, with posterior particles. Right: the data and
# draws of the fitted model, both turned back into the roll's own plane.
generated = Predictive(model, params=fit.params, num_samples=1)(random.key(4), num_data=2000)["y"][0]
back = np.linalg.pinv(rotation)
fig, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
plot_energy(fit, ax=axes[0])
for ax, points, title in zip(axes[1:], (y[:2000], generated), ("data", "draws of the fitted model"), strict=True):
    ax.scatter(*(points @ back).T, s=2, alpha=0.5)
    ax.set(title=title, aspect="equal", xlim=(-2.6, 2.6), ylim=(-2.6, 2.6))
plt.show()

# %%
# What to try next
# ----------------
# - ``fit.diagnostics()`` says whether the run was long enough; the default is 5000 steps.
# - ``EBIPLA(model).log_likelihood(key, fit.params, new_y)`` for data never seen: see :doc:`/likelihood`.
# - Another decoder, such as a network with two hidden layers.
