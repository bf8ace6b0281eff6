"""
Masses of modes, and log Z at every step
========================================

A mixture of two Gaussians far apart, as in Carbone et al. (2023): any method finds where the modes are, but their
masses need walkers that cross between them or that carry weights. Persistent contrastive divergence has neither.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from jax.scipy.special import logsumexp

from numpyro_ebipla import EBIPLA, EnergyPrior, recipes

first = random.bernoulli(random.key(0), 0.25, (4000, 1))
y = jnp.where(first, -4.0, 3.0) + random.normal(random.key(1), (4000, 2))

# %%
# The energy has the two means and the log ratio of the masses as parameters. The base cancels, so that at the truth the
# density is the mixture itself.
base = dist.Normal(0, 1).expand([2]).to_event(1)


def model(y):
    means = numpyro.param("means", jnp.array([[-1.0, -1.0], [1.0, 1.0]]))
    logit = numpyro.param("logit", 0.0)

    def energy(x):
        each = -0.5 * jnp.square(x[..., None, :] - means).sum(-1) + jnp.array([1.0, 0.0]) * logit
        return -logsumexp(each, -1) + base.log_prob(x)

    with numpyro.plate("data", len(y)):
        numpyro.sample("y", EnergyPrior(energy, base), obs=y)


systems = {
    "default (tempered walkers)": EBIPLA(model),
    "Jarzynski weights": recipes.jarzynski_ebm(model),
    "persistent CD": recipes.pcd(model),
}
fits = {name: ebipla.run(random.key(2), y, num_steps=2000, progress_bar=False) for name, ebipla in systems.items()}
masses = {name: 1 / (1 + np.exp(-float(fit.params["logit"]))) for name, fit in fits.items()}
for name, fit in fits.items():
    print(f"{name:27} means {np.round(fit.params['means'][:, 0], 2)}, mass of the first {masses[name]:.3f}")
print(f"{'data':27} mass of the first {float(first.mean()):.3f}")

# %%
# The densities along the diagonal. The normaliser of this energy is known:
# :math:`Z = 2\pi\,(e^{\mathrm{logit}} + 1)`.
t = np.linspace(-8, 7, 400)
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
axes[0].hist(np.asarray(y.mean(1)), 80, density=True, color="0.85", label="data")
for (name, fit), style in zip(fits.items(), ("-", "--", ":"), strict=True):
    mass = masses[name]
    centres = np.asarray(fit.params["means"]).mean(1)
    density = sum(
        w * np.exp(-np.square(t - c)) / np.sqrt(np.pi) for w, c in zip((mass, 1 - mass), centres, strict=True)
    )
    axes[0].plot(t, density, style, label=name)
axes[0].set(xlabel="mean of the two coordinates", ylabel="density")
axes[0].legend()
log_z = fits["Jarzynski weights"].history["y/log_z"]
axes[1].plot(log_z, label="by the weights, as the run goes on")
exact = float(jnp.log(2 * jnp.pi) + jnp.logaddexp(0.0, fits["Jarzynski weights"].params["logit"]))
axes[1].axhline(exact, color="k", ls=":", label="exact, at the end")
axes[1].set(xlabel="step", ylabel="log Z")
axes[1].legend()
plt.show()

# %%
# What to try next
# ----------------
# - Move the modes further apart.
# - ``fits["persistent CD"].diagnostics()``: does it know?
