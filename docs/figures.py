"""Draw the figures of the pages on models, diagnostics, likelihoods and the algorithm: ``python docs/figures.py``.

They are kept in ``docs/_static``, as the fits take five minutes. Each function is one figure.
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import linen as nn
from jax import random
from jax.scipy.special import logsumexp
from numpyro.contrib.module import flax_module
from scipy import stats

from numpyro_ebipla import EBIPLA, EnergyPrior
from numpyro_ebipla.plots import plot_energy, plot_parameters

plt.switch_backend("Agg")

STATIC = Path(__file__).parent / "_static"
POSITIVE = dist.constraints.positive
NORMAL = dist.Normal(0, 1).expand([2]).to_event(1)


class MLP(nn.Module):
    """An energy with two hidden layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.silu(nn.Dense(64)(nn.silu(nn.Dense(64)(x)))))[..., 0]


def three_modes(num):
    """Points about three corners, with noise of standard deviation 0.3."""
    rng = np.random.default_rng(0)
    corners = 1.5 * np.stack([np.cos([0.5, 2.6, 4.7]), np.sin([0.5, 2.6, 4.7])], 1)
    x = corners[rng.choice(3, num, p=[0.5, 0.3, 0.2])] + 0.2 * rng.normal(size=(num, 2))
    return (x + 0.3 * rng.normal(size=(num, 2))).astype(np.float32)


def planar(y):
    """An energy prior in the plane, seen with noise."""
    energy = flax_module("energy", MLP(), input_shape=(2,))
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", EnergyPrior(energy, NORMAL))
        numpyro.sample("y", dist.Normal(x, 0.3).to_event(1), obs=y)


def one_energy(y):
    """A double well on a line, seen with noise."""
    a, b = numpyro.param("a", 0.0), numpyro.param("b", 0.1, constraint=POSITIVE)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", EnergyPrior(lambda x: b * x**4 - a * x**2, dist.Normal(0, 1)))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)


def one_level(y):
    """The first model of the page on diagnostics."""
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


def fit(model, *args, **more):
    """Run with the defaults, without a bar."""
    return EBIPLA(model).run(random.key(0), *args, progress_bar=False, **more)


def prior():
    """Base, factor exp(−E) and prior of a fitted double well, beside the law that the data come from."""
    rng = np.random.default_rng(1)
    x = np.where(rng.random(600) < 0.5, -1.3, 1.3) + 0.4 * rng.normal(size=600)
    y = (x + 0.5 * rng.normal(size=600)).astype(np.float32)
    found = fit(one_energy, y)
    grid = jnp.linspace(-4, 4, 401)
    fitted = found.energy_prior("x")
    unnormalised = fitted.log_prob(grid)
    density = jnp.exp(unnormalised - logsumexp(unnormalised)) / (grid[1] - grid[0])
    factor = jnp.exp(unnormalised - dist.Normal(0, 1).log_prob(grid))
    truth = 0.5 * sum(stats.norm.pdf(np.asarray(grid), m, 0.4) for m in (-1.3, 1.3))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.3), layout="constrained")
    left.plot(grid, jnp.exp(dist.Normal(0, 1).log_prob(grid)), label="base $p_0(x)$")
    left.plot(grid, factor / factor.max(), label="$e^{-E(x)}$, scaled")
    left.plot(grid, density, "k", lw=2, label="their product, normalised")
    right.hist(y, 40, density=True, color="0.85", label="data, with noise of 0.5")
    right.plot(grid, truth, "C2--", label="law of the latents")
    right.plot(grid, density, "k", lw=2, label="fitted prior")
    for ax in (left, right):
        ax.set(xlabel="x", xlim=(-4, 4), ylim=(0, None))
        ax.legend(fontsize="small")
    left.set(title="a prior is a base and an energy", ylim=(0, 1.45))
    right.set(title="fitted to noisy data", ylabel="density", ylim=(0, 0.75))
    return figure


def stages(ends=(1, 100, 400, 3000)):
    """Return fits of the three modes after so many steps, each going on from the one before."""
    y, ebipla, state, begun, found = three_modes(500), EBIPLA(planar), None, 0, []
    for end in ends:
        start = {} if state is None else {"init_state": state}
        found.append(ebipla.run(random.key(0), y, num_steps=end - begun, progress_bar=False, **start))
        state, begun = found[-1].state, end
    return dict(zip(ends, found, strict=True))


def walkers(found):
    """Particles and walkers while the energy moves."""
    figure, axes = plt.subplots(1, len(found), figsize=(13, 3.4), layout="constrained")
    for ax, (end, at) in zip(axes, found.items(), strict=True):
        plot_energy(at, ax, limits=(-2.8, 2.8, -2.8, 2.8))
        ax.set(title=f"after {end} step{'s' * (end > 1)}", xlabel="", ylabel="")
        if ax is not axes[0]:
            ax.get_legend().remove()
    for bar in [ax for ax in figure.axes if ax not in {*axes}][:-1]:
        bar.remove()
    return figure


def ladder(found):
    """Walkers of all temperatures, from the start of the ladder to the prior."""
    state = found.state.prior["x"]
    rungs, temps = np.asarray(state.position), np.asarray(state.ladder.temperature)
    figure, axes = plt.subplots(1, len(rungs), figsize=(14, 2.2), layout="constrained", sharex=True, sharey=True)
    for ax, x, t in zip(axes, rungs, temps, strict=True):
        ax.scatter(*x.T, s=6, color="red", linewidths=0)
        ax.set(title=f"t = {t:.2g}", xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), aspect="equal")
    return figure


def safeguards():
    """What holds the energy back: much on the way, where the data are far from the base."""
    found = fit(planar, three_modes(500) + np.float32(6), num_steps=2000)
    shown = {
        "trust": "share of the rate that the energy may take",
        "x/gap": "particles lie lower than walkers by (nats)",
        "x/swap": "rarest swap of neighbours",
    }
    figure, axes = plt.subplots(1, len(shown), figsize=(13, 2.8), layout="constrained")
    for ax, (name, title) in zip(axes, shown.items(), strict=True):
        ax.plot(found.history[name], lw=0.8)
        ax.set(title=title, xlabel="step")
    return figure


def diagnostics():
    """The path of a parameter after too few steps, and after enough."""
    y = 2 + 1.4 * random.normal(random.key(0), (400,))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", sharey=True)
    for ax, num_steps in zip(axes, (100, 2000), strict=True):
        found = fit(one_level, y, num_steps=num_steps)
        plot_parameters(found, [ax])
        gain = found.diagnostics()["nats to gain, in all"].value
        ax.set_title(f"mean after {len(found.losses)} steps: {abs(gain):.2g} nats to gain")
    return figure


def likelihood():
    """Log likelihoods of counts, and their errors, beside quadrature."""
    y = np.random.default_rng(2).poisson(np.exp(0.5 + np.random.default_rng(3).normal(size=300))).astype(np.int32)

    def counts(y):
        mean, s = numpyro.param("mean", 0.0), numpyro.param("s", 1.0, constraint=POSITIVE)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Normal(mean, s))
            numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y)

    found = EBIPLA(counts).log_likelihood(random.key(0), {"mean": 0.5, "s": 1.0}, y)
    node = np.linspace(-8, 8, 20_001)
    exact = np.log(stats.poisson.pmf(y[:, None], np.exp(0.5 + node)) @ stats.norm.pdf(node) * (node[1] - node[0]))
    error = np.asarray(found.value) - exact
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    left.scatter(y, exact, s=30, color="0.8", label="quadrature")
    left.scatter(y, found.value, s=5, color="C0", label="log_likelihood")
    left.set(xlabel="count", ylabel="log p(y), nats", title="each datum")
    left.legend()
    grid = np.linspace(-4, 4, 200)
    right.hist(error / np.asarray(found.std_error), 40, range=(-4, 4), density=True, color="0.8")
    right.plot(grid, stats.norm.pdf(grid), "C1", label="standard normal")
    right.set(
        xlabel="error in its own standard errors",
        title=f"all data: {error.sum():+.1g} ± {found.total.std_error:.1g} nats",
    )
    right.legend()
    return figure


if __name__ == "__main__":
    course = stages()
    for draw, *args in (
        (walkers, course),
        (ladder, course[3000]),
        (prior,),
        (safeguards,),
        (diagnostics,),
        (likelihood,),
    ):
        draw(*args).savefig(STATIC / f"{draw.__name__}.png", dpi=100)
