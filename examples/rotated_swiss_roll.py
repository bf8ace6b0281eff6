"""The rotated Swiss roll: a latent energy model with a prior that is right, not only walkers that look right.

A 2-d roll is rotated into R^10 and observed with noise. A linear decoder and an energy-based prior over two
latents are fitted with the default settings, and judged by what is known exactly here: the density of the data,
the normaliser of the prior on a grid, and exact draws from the prior. NumPyro's SVI, with the same decoder, an
encoder and a Gaussian prior, stands beside it.

    python examples/rotated_swiss_roll.py --help
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import linen as nn
from jax import random
from jax.scipy.special import logsumexp
from numpyro.contrib.module import flax_module
from numpyro.infer import SVI, Predictive, Trace_ELBO

from numpyro_ebipla import EBIPLA, EnergyPrior

NOISE, BLUR = 0.1, 0.05  # of the observations, and across the roll
QUICK_STEPS = 1000
TURNS = (1.5 * np.pi, 4.5 * np.pi)


class MLP(nn.Module):
    """Two hidden layers of 128; the last axis is dropped if there is one output."""

    num_outputs: int = 1

    @nn.compact
    def __call__(self, x):
        for width in (128, 128):
            x = nn.silu(nn.Dense(width)(x))
        x = nn.Dense(self.num_outputs)(x)
        return x[..., 0] if self.num_outputs == 1 else x


def model(y=None, num_data=1000, batch_size=None):
    """Energy-based prior in R^2, linear decoder to R^10."""
    energy = flax_module("energy", MLP(), input_shape=(2,))
    decoder = flax_module("decoder", nn.Dense(10), input_shape=(2,))
    with numpyro.plate("data", num_data if y is None else len(y), subsample_size=batch_size):
        x = numpyro.sample("x", EnergyPrior(energy, dist.Normal(0, 1).expand([2]).to_event(1)))
        batch = None if y is None else numpyro.subsample(y, event_dim=1)
        numpyro.sample("y", dist.Normal(decoder(x), NOISE).to_event(1), obs=batch)


def gaussian_model(y, batch_size):
    """The same decoder under a Gaussian prior."""
    decoder = flax_module("decoder", nn.Dense(10), input_shape=(2,))
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        x = numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(decoder(x), NOISE).to_event(1), obs=numpyro.subsample(y, event_dim=1))


def encoder_guide(y, batch_size):
    """An amortised Gaussian posterior."""
    encoder = flax_module("encoder", MLP(4), input_shape=(10,))
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        out = encoder(numpyro.subsample(y, event_dim=1))
        scale = jnp.exp(out[..., 2:])
        numpyro.sample("x", dist.Normal(out[..., :2], scale).to_event(1))


# --- what is known exactly ----------------------------------------------------------------------------


def draw_roll(rng_key, num):
    """Points ``[num, 2]`` of the roll."""
    key_turn, key_blur = random.split(rng_key)
    t = random.uniform(key_turn, (num,), minval=TURNS[0], maxval=TURNS[1])
    return jnp.stack([t * jnp.cos(t), t * jnp.sin(t)], -1) / 7 + BLUR * random.normal(key_blur, (num, 2))


def true_log_density(y, rotation):
    """log p(y): one integral along the roll, by quadrature; Gaussian in the other directions."""
    t = jnp.linspace(*TURNS, 4001)
    centre = jnp.stack([t * jnp.cos(t), t * jnp.sin(t)], -1) / 7
    along = y @ rotation
    across = (y**2).sum(-1) - (along**2).sum(-1)
    variance = BLUR**2 + NOISE**2
    square = ((along[:, None] - centre) ** 2).sum(-1)
    inside = logsumexp(-0.5 * square / variance, 1) - jnp.log(len(t) * 2 * jnp.pi * variance)
    return inside - 0.5 * across / NOISE**2 - 4 * jnp.log(2 * jnp.pi * NOISE**2)


class Grid:
    """The fitted prior on a fine grid of R^2: its normaliser, exact draws and exact likelihoods."""

    def __init__(self, prior, params, half_width=5.0, num=301):
        axis = jnp.linspace(-half_width, half_width, num)
        self.points = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
        self.cell = (axis[1] - axis[0]) ** 2
        self.log_prob = prior.log_prob(self.points)
        self.log_z = float(logsumexp(self.log_prob) + jnp.log(self.cell))
        self.mean = self.points @ params["decoder$params"]["kernel"] + params["decoder$params"]["bias"]

    def log_likelihood(self, y):
        """log p(y) under the fitted model."""
        weight = self.log_prob - self.log_z + jnp.log(self.cell)

        def one(y):
            square = ((y - self.mean) ** 2).sum(-1)
            return logsumexp(weight - 0.5 * square / NOISE**2) - 5 * jnp.log(2 * jnp.pi * NOISE**2)

        return jax.lax.map(one, y)

    def draw(self, rng_key, num):
        """Decoded exact draws of the prior, ``[num, 10]``."""
        return self.mean[random.categorical(rng_key, self.log_prob, shape=(num,))]


def gaussian_log_likelihood(y, params):
    """log p(y) of the linear decoder under a Gaussian prior, in closed form."""
    kernel, bias = params["decoder$params"]["kernel"], params["decoder$params"]["bias"]
    covariance = kernel.T @ kernel + NOISE**2 * jnp.eye(10)
    return dist.MultivariateNormal(bias, covariance).log_prob(y)


def mmd2(a, b):
    """Unbiased squared maximum mean discrepancy: mean of RBF kernels at 0.05, 0.2 and 1 × the median distance."""

    def square(u, v):
        return (u**2).sum(1)[:, None] + (v**2).sum(1) - 2 * u @ v.T

    median = jnp.median(square(b[:500], b[:500]))

    def kernel(u, v):
        return sum(jnp.exp(-0.5 * square(u, v) / (scale * median)) for scale in (0.05, 0.2, 1.0)) / 3

    def mean_off_diagonal(k):
        return (k.sum() - jnp.trace(k)) / (len(k) * (len(k) - 1))

    return float(mean_off_diagonal(kernel(a, a)) + mean_off_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean())


# --- the run ------------------------------------------------------------------------------------------


def main(args):
    """Fit, judge, print and plot."""
    keys = random.split(random.key(args.seed), 8)
    rotation = jnp.linalg.qr(random.normal(keys[0], (10, 10)))[0][:, :2]

    def observe(key, num):
        key_roll, key_noise = random.split(key)
        return draw_roll(key_roll, num) @ rotation.T + NOISE * random.normal(key_noise, (num, 10))

    y, held_out = observe(keys[1], args.num_data), observe(keys[2], 2000)
    clean = draw_roll(keys[3], 2000) @ rotation.T
    truth = true_log_density(held_out, rotation)

    print(f"EBIPLA, {args.num_data} points: about half a minute to compile, then one to two minutes of steps and draws")
    start = time.time()
    ebipla = EBIPLA(model) if args.num_steps is None else EBIPLA(model, num_steps=args.num_steps)
    fit = ebipla.run(
        keys[4], y, batch_size=args.batch_size, indices=np.arange(min(500, len(y))), progress_bar=not args.quiet
    )
    seconds = time.time() - start
    grid = Grid(fit.energy_prior("x"), fit.params)
    log_z, error = fit.log_normalizer("x")
    gap = float((truth - grid.log_likelihood(held_out)).mean())

    print(f"EBIPLA took {seconds:.0f} s; now SVI, half a minute, and exact draws")
    svi = SVI(gaussian_model, encoder_guide, numpyro.optim.Adam(3e-3), Trace_ELBO())
    start = time.time()
    svi_fit = svi.run(keys[5], 5000, y, batch_size=min(500, len(y)), progress_bar=False)
    svi_seconds = time.time() - start
    svi_gap = float((truth - gaussian_log_likelihood(held_out, svi_fit.params)).mean())
    svi_draws = random.normal(keys[6], (2000, 2)) @ svi_fit.params["decoder$params"]["kernel"]
    svi_draws = svi_draws + svi_fit.params["decoder$params"]["bias"]
    exact = grid.draw(keys[6], 2000)
    floor = mmd2(draw_roll(keys[7], 2000) @ rotation.T, clean)

    generated = Predictive(model, params=fit.params, num_samples=1)(keys[7], num_data=2000)["y"][0]
    print(f"\n{args.num_data} points, {len(fit.losses)} steps, seed {args.seed}")
    print(f"{'':34}{'EBIPLA':>12}{'SVI':>12}{'target':>12}")
    print(f"{'held-out gap to truth (nats)':34}{gap:12.4f}{svi_gap:12.4f}{'0.06':>12}")
    print(f"{f'MMD² of exact draws (floor {floor:.0e})':34}{mmd2(exact, clean):12.1e}", end="")
    print(f"{mmd2(svi_draws, clean):12.1e}{'1e-3':>12}")
    print(f"{'log Z estimated ± error':34}{f'{log_z:.3f} ± {error:.3f}':>16}")
    print(f"{'log Z on a grid':34}{grid.log_z:12.3f}{'':12}{'± 0.1':>12}")
    print(f"{'seconds':34}{seconds:12.1f}{svi_seconds:12.1f}")
    if fit.stopped:
        print(f"stopped early: {fit.stopped}")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    plot(args.output, fit, grid, generated, held_out, rotation, gap)
    print(f"figure: {args.output}")


def plot(path, fit, grid, generated, held_out, rotation, gap):
    """Four panels: the prior, the data against new data, particles of a few data, the history."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 10), layout="constrained")
    side = int(len(grid.points) ** 0.5)
    density = jnp.exp(grid.log_prob - grid.log_z).reshape(side, side)
    extent = [float(grid.points[0, 0]), float(grid.points[-1, 0])] * 2
    samples = fit.get_samples()["x"]
    reach = 1.15 * np.abs(samples).max()

    def show_prior(axis, title):
        image = axis.imshow(density, origin="lower", extent=extent, cmap="Greys")
        axis.set(title=title, xlabel="latent 1", ylabel="latent 2", xlim=(-reach, reach), ylim=(-reach, reach))
        return image

    image = show_prior(axes[0, 0], "Fitted prior density, normalised on a grid")
    figure.colorbar(image, ax=axes[0, 0], label="density")

    show_prior(axes[0, 1], "Posterior particles of eight data on the prior")
    for i in range(8):
        axes[0, 1].scatter(*samples[:, ::5, i].reshape(-1, 2).T, s=4, color=f"C{i}")

    for data, label, colour in ((held_out, "held-out data", "C7"), (generated, "generated", "C3")):
        axes[1, 0].scatter(*(data @ rotation).T, s=3, alpha=0.6, label=label, color=colour)
    axes[1, 0].set(
        title=f"Data in the plane of the roll: {gap:.3f} nats per point from the truth",
        xlabel="in the plane 1",
        ylabel="in the plane 2",
        aspect="equal",
    )
    axes[1, 0].legend(markerscale=4, loc="upper right")

    window = max(1, len(fit.losses) // 100)
    smooth = np.convolve(fit.losses, np.ones(window) / window, "valid")
    axes[1, 1].plot(np.arange(len(smooth)) + window, smooth, color="C0")
    axes[1, 1].set(title="Contrast and log Z over the fit", xlabel="step", ylabel="contrast (moving mean)")
    axes[1, 1].yaxis.label.set_color("C0")
    low, high = np.percentile(smooth, [0, 90])
    axes[1, 1].set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
    other = axes[1, 1].twinx()
    other.plot(fit.history["x/log_z"], color="C1", linewidth=0.7)
    other.axhline(grid.log_z, color="C1", linestyle="--", linewidth=1)
    other.set_ylabel("log Z of the walkers (dashed: grid, at the end)", color="C1")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(argv=None):
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the rotation, the data and the fit (default 0)")
    parser.add_argument("--num-data", type=int, default=4000, help="observations (default 4000)")
    parser.add_argument("--batch-size", type=int, default=500, help="data per step (default 500)")
    parser.add_argument("--num-steps", type=int, default=None, help="steps (default: the package's own)")
    parser.add_argument("--output", default="examples/output/rotated_swiss_roll.png", help="figure to write")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--quick", action="store_true", help="a fifth of the steps: a minute, and a rougher prior")
    args = parser.parse_args(argv)
    if args.quick and args.num_steps is None:
        args.num_steps = QUICK_STEPS
    return args


if __name__ == "__main__":
    matplotlib.use("Agg")
    main(parse())
