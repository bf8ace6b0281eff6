"""
Factors that come in clusters
=============================

Factor analysis supposes normal factors. Here two factors explain four measurements of 150 irises, and a mixture as
the factors' energy finds the species, which the fit is not told.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from jax.scipy.special import logsumexp
from sklearn.datasets import load_iris

from numpyro_ebipla import EBIPLA, EnergyPrior, compare
from numpyro_ebipla.plots import plot_energy

iris = load_iris()
y = ((iris.data - iris.data.mean(0)) / iris.data.std(0)).astype(np.float32)
base = dist.Normal(0, 1).expand([2]).to_event(1)


def model(y, clusters=0):
    loadings = numpyro.param("loadings", 0.5 * jnp.eye(4)[:2])
    noise = numpyro.param("noise", jnp.ones(4), constraint=dist.constraints.positive)
    prior = base
    if clusters:
        centres = numpyro.param("centres", random.normal(random.key(0), (clusters, 2)))
        heights = numpyro.param("heights", jnp.zeros(clusters))
        scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)

        def energy(x):
            far = jnp.square((x[..., None, :] - centres) / scale).sum(-1)
            return -logsumexp(heights - 0.5 * far, -1)

        prior = EnergyPrior(energy, base)
    with numpyro.plate("flowers", len(y)):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x @ loadings, noise).to_event(1), obs=y)


normal = EBIPLA(model).run(random.key(1), y, num_steps=1000, progress_bar=False)
mixed = EBIPLA(model, clusters=3).run(random.key(1), y, num_steps=2000, progress_bar=False)
print(compare({"normal factors": normal, "clustered factors": mixed}))

# %%
# Posterior means of the flowers, coloured by the species, and the landscape of the fitted prior with all posterior
# particles on it. The factors are turned and scaled differently, as the two fits are free to do.
fig, axes = plt.subplots(1, 3, figsize=(11.5, 3.8), layout="constrained")
for ax, fit, title in zip(axes, (normal, mixed), ("normal factors", "clustered factors"), strict=False):
    at = fit.get_samples()["x"].mean((0, 1))
    for species, marker in zip(range(3), "os^", strict=True):
        ax.scatter(*at[iris.target == species].T, s=14, marker=marker, label=iris.target_names[species])
    ax.set(
        title=title, xlabel="first factor", ylabel="second factor", aspect="equal", xlim=(-4.2, 4.2), ylim=(-4.2, 4.2)
    )
axes[0].legend(loc="upper left")
plot_energy(mixed, ax=axes[2])
plt.show()

# %%
# What to try next
# ----------------
# - ``clusters=2`` or ``4``, and the same comparison.
# - A network as the energy, with more data: :doc:`/gallery/swiss_roll`.
