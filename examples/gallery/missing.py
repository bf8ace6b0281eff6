"""
Missing values
==============

A third of the pixels of each digit is missing. The likelihood of an image is that of its visible pixels, so the model
can be fitted to what there is; and what is not there follows from the posterior of the latents.
"""

import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import linen as nn
from jax import random
from numpyro.contrib.module import flax_module
from sklearn.datasets import load_digits
from sklearn.impute import KNNImputer, SimpleImputer

from numpyro_ebipla import EBIPLA, EnergyPrior, nan_masked
from numpyro_ebipla.plots import plot_images

whole = (load_digits().data / 16).astype(np.float32)
hidden = np.random.default_rng(0).random(whole.shape) < 1 / 3
y = np.where(hidden, np.nan, whole)

# %%
# The model is written as if nothing were missing. :class:`.nan_masked` leaves every NaN out of the densities.


class Net(nn.Module):
    num_outputs: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.num_outputs)(nn.silu(nn.Dense(64)(x)))
        return x[..., 0] if self.num_outputs == 1 else x


def model(y, batch_size=None):
    energy = flax_module("energy", Net(1), input_shape=(8,))
    decoder = flax_module("decoder", Net(64), input_shape=(8,))
    noise = numpyro.param("noise", 0.2, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        x = numpyro.sample("x", EnergyPrior(energy, dist.Normal(0, 1).expand([8]).to_event(1)))
        pixels = numpyro.deterministic("pixels", decoder(x))
        seen = numpyro.subsample(y, event_dim=1)
        numpyro.sample("y", dist.Normal(pixels, noise).to_event(1), obs=seen)


fit = EBIPLA(nan_masked(model)).run(
    random.key(0), y, batch_size=300, num_steps=3000, num_samples=10, thinning=3, warmup=20, progress_bar=False
)
filled = fit.get_samples()["pixels"].mean((0, 1))

# %%
# Errors in the hidden pixels, in grey values from 0 to 1, beside the mean of each pixel and the mean of the five
# nearest digits.
guesses = {
    "mean of the pixel": SimpleImputer().fit_transform(y),
    "nearest digits": KNNImputer().fit_transform(y),
    "energy prior": filled,
}
for name, guess in guesses.items():
    print(f"{name:18} root mean squared error {np.sqrt(np.square(guess - whole)[hidden].mean()):.3f}")
columns = {
    "what is seen": y,
    **{name: np.where(hidden, guess, whole) for name, guess in guesses.items()},
    "truth": whole,
}
fig, axes = plt.subplots(1, len(columns), figsize=(11, 2.8), layout="constrained")
for ax, (name, images) in zip(axes, columns.items(), strict=True):
    plot_images(np.nan_to_num(images[:36], nan=0.5), ax=ax, image_shape=(8, 8), vmin=0, vmax=1)
    ax.set_title(name)
plt.show()

# %%
# What to try next
# ----------------
# - ``fit.get_samples()["pixels"].std((0, 1))``: how sure is the fit of what it cannot see?
# - ``EBIPLA.reconstruct`` does the same for images that were not fitted to.
# - Hide the upper half of each digit, rather than a third at random.
