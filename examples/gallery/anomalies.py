"""
Anomalies by their likelihood
=============================

A model of handwritten digits gives a likelihood to every image. Images that it was not made for should have a low one.
Here the model has seen all digits but the nines, and is asked which of new images are nines: beside the distance from
principal components, and the bound of a variational autoencoder.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import linen as nn
from jax import random, vmap
from numpyro.contrib.module import flax_module
from numpyro.infer import SVI, Trace_ELBO
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, roc_curve

from numpyro_ebipla import EBIPLA, EnergyPrior
from numpyro_ebipla.plots import plot_images

digits = load_digits()
images = (digits.data / 16).astype(np.float32)
images += np.random.default_rng(0).normal(0, 0.05, images.shape).astype(np.float32)  # grey values have 17 levels
known = np.flatnonzero(digits.target != 9)
train, rest = known[::2], known[1::4]
test = np.concatenate([rest, np.flatnonzero(digits.target == 9)])
anomalous = digits.target[test] == 9
y = images[train]


class Net(nn.Module):
    num_outputs: int
    width: int = 64

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.num_outputs)(nn.silu(nn.Dense(self.width)(x)))
        return x[..., 0] if self.num_outputs == 1 else x


def model(y, batch_size=None, energy=True):
    decoder = flax_module("decoder", Net(64), input_shape=(8,))
    noise = numpyro.param("noise", 0.2, constraint=dist.constraints.positive)
    prior = dist.Normal(0, 1).expand([8]).to_event(1)
    if energy:
        prior = EnergyPrior(flax_module("energy", Net(1), input_shape=(8,)), prior)
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        x = numpyro.sample("x", prior)
        seen = numpyro.subsample(y, event_dim=1)
        numpyro.sample("y", dist.Normal(decoder(x), noise).to_event(1), obs=seen)


ebipla = EBIPLA(model)
fit = ebipla.run(random.key(0), y, batch_size=200, num_steps=1500, num_samples=0, progress_bar=False)
score = {"energy prior, log-likelihood": ebipla.anomaly_score(random.key(1), fit.params, images[test], batch_size=200)}

# %%
# The other two. The autoencoder has the same decoder, under a Gaussian prior, and an encoder of its size.


def guide(y, batch_size=None, energy=False):
    encoder = flax_module("encoder", Net(16), input_shape=(64,))
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        mean, log_sd = jnp.split(encoder(numpyro.subsample(y, event_dim=1)), 2, -1)
        numpyro.sample("x", dist.Normal(mean, jnp.exp(log_sd)).to_event(1))


svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO(), energy=False)
vae = svi.run(random.key(2), 10_000, y, batch_size=200, progress_bar=False).params
bound = Trace_ELBO(num_particles=64)
score["VAE, ELBO"] = vmap(lambda v: bound.loss(random.key(3), vae, model, guide, v[None], energy=False))(images[test])
pca = PCA(8).fit(y)
score["PCA, distance"] = np.square(images[test] - pca.inverse_transform(pca.transform(images[test]))).sum(1)

# %%
# Receiver operating characteristics, and the images of the test that the energy prior finds least likely.
fig, axes = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained", width_ratios=(1.2, 1))
for (name, value), style in zip(score.items(), ("-", "--", ":"), strict=True):
    area = roc_auc_score(anomalous, value)
    axes[0].plot(*roc_curve(anomalous, value)[:2], style, label=f"{name}: area {area:.3f}")
axes[0].set(xlabel="other digits called nines", ylabel="nines found")
axes[0].legend()
least = np.argsort(-np.asarray(score["energy prior, log-likelihood"]))[:36]
plot_images(images[test][least], ax=axes[1], image_shape=(8, 8), columns=6)
axes[1].set_title("least likely of all")
plt.show()

# %%
# What to try next
# ----------------
# - Another digit left out. Ones are easy, as they are unlike all others.
# - :doc:`/likelihood` says how the likelihoods are computed, and how sure they are.
