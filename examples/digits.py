"""Real 8×8 digits: a latent energy model against the same generator with a Gaussian prior.

Both are fitted by the same algorithm with the default settings. The energy's walkers take no part in the
judgement: generated digits come from draws annealed afresh from the fitted prior.

    python examples/digits.py --help
"""

import argparse
import time
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import linen as nn
from jax import random
from numpyro.contrib.module import flax_module
from sklearn.datasets import load_digits

from numpyro_ebipla import EBIPLA, EnergyPrior

NOISE = 0.25  # of a pixel, on the scale from −1 to 1


class MLP(nn.Module):
    """Two hidden layers of 128; the last axis is dropped if there is one output."""

    num_outputs: int = 1

    @nn.compact
    def __call__(self, x):
        for width in (128, 128):
            x = nn.silu(nn.Dense(width)(x))
        x = nn.Dense(self.num_outputs)(x)
        return x[..., 0] if self.num_outputs == 1 else x


def make_model(num_latents, energy_based):
    """The generator under an energy-based or a Gaussian prior."""

    def model(y=None, num_data=1000, batch_size=None):
        decoder = flax_module("decoder", MLP(64), input_shape=(num_latents,))
        prior = dist.Normal(0, 1).expand([num_latents]).to_event(1)
        if energy_based:
            prior = EnergyPrior(flax_module("energy", MLP(), input_shape=(num_latents,)), prior)
        with numpyro.plate("data", num_data if y is None else len(y), subsample_size=batch_size):
            x = numpyro.sample("x", prior)
            mean = numpyro.deterministic("mean", decoder(x))
            batch = None if y is None else numpyro.subsample(y, event_dim=1)
            numpyro.sample("y", dist.Normal(mean, NOISE).to_event(1), obs=batch)

    return model


def load(seed):
    """Digits scaled to [−1, 1]: four fifths to train on, the rest held out."""
    images = load_digits().data / 8 - 1
    order = np.random.RandomState(seed).permutation(len(images))
    cut = len(images) * 4 // 5
    return jnp.asarray(images[order[:cut]], jnp.float32), jnp.asarray(images[order[cut:]], jnp.float32)


def mmd2(a, b):
    """Unbiased squared maximum mean discrepancy: mean of RBF kernels at 0.05, 0.2 and 1 × the median distance."""

    def square(u, v):
        return (u**2).sum(1)[:, None] + (v**2).sum(1) - 2 * u @ v.T

    median = jnp.median(square(b, b))

    def kernel(u, v):
        return sum(jnp.exp(-0.5 * square(u, v) / (scale * median)) for scale in (0.05, 0.2, 1.0)) / 3

    def mean_off_diagonal(k):
        return (k.sum() - jnp.trace(k)) / (len(k) * (len(k) - 1))

    return float(mean_off_diagonal(kernel(a, a)) + mean_off_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean())


def decode(fit, x):
    """Pixel means of latents."""
    return MLP(64).apply({"params": fit.params["decoder$params"]}, x)


def main(args):
    """Fit both, compare, print and plot."""
    train, held_out = load(args.seed)
    fits, generated = {}, {}
    key = random.key(args.seed)
    shown = np.arange(len(train)) if args.batch_size is None else np.arange(400)
    for name in ("energy", "gaussian"):
        start = time.time()
        ebipla = EBIPLA(make_model(args.latents, name == "energy"), **args.settings)
        fit = ebipla.run(
            key,
            train,
            batch_size=args.batch_size,
            indices=shown,
            sites=["x", "mean"],
            progress_bar=not args.quiet,
        )
        seconds = time.time() - start
        if name == "energy":
            x = fit.energy_prior("x").sample(random.key(1), (2000,))
        else:
            x = random.normal(random.key(1), (2000, args.latents))
        fits[name], generated[name] = fit, decode(fit, x)
        print(f"{name:9} prior: {len(fit.losses)} steps in {seconds:.0f} s; {fit.stopped or 'no divergence'}")

    samples = fits["energy"].get_samples()
    reconstructed = samples["mean"].mean((0, 1))
    error = float(((reconstructed - np.asarray(train[shown])) ** 2).mean())
    noise = random.normal(random.key(2), held_out.shape)
    floor = mmd2(train, held_out)
    scores = {name: mmd2(draws, held_out) for name, draws in generated.items()}
    noisy = {
        name: mmd2(draws + NOISE * random.normal(random.key(3), draws.shape), held_out)
        for name, draws in generated.items()
    }
    log_z, log_z_error = fits["energy"].log_normalizer("x")
    energies = latent_energies(fits["energy"], {"held-out digits": held_out, "noise": noise})

    print(f"\nd = {args.latents}, seed {args.seed}; squared MMD to held-out digits (training digits: {floor:.1e})")
    print(f"{'prior':12}{'digits':>10}{'with pixel noise':>18}")
    for name in fits:
        print(f"{name:12}{scores[name]:10.2e}{noisy[name]:18.2e}")
    print(f"{'ratio':12}{scores['gaussian'] / scores['energy']:10.1f}{noisy['gaussian'] / noisy['energy']:18.1f}")
    print(f"reconstruction error {error:.4f} per pixel; log Z {log_z:.2f} ± {log_z_error:.2f}")
    for name, values in energies.items():
        print(f"energy of the best latent for {name}: {values.mean():.1f} ± {values.std():.1f}")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    plot(args.output, train[shown], reconstructed, generated, scores, energies)
    print(f"figure: {args.output}")


def latent_energies(fit, images, num_steps=300):
    """``E(x) + ½‖x‖² + ½‖y − g(x)‖²/σ²`` at its minimum in x, by Adam: an anomaly score in nats."""
    import jax
    import optax

    prior = fit.energy_prior("x")

    def score(x, y):
        return -prior.log_prob(x) + 0.5 * ((y - decode(fit, x)) ** 2).sum(-1) / NOISE**2

    scores = {}
    for name, y in images.items():
        x = jnp.zeros((len(y), prior.event_shape[0]))
        optim = optax.adam(0.05)

        def descend(carry, _, y=y, optim=optim):
            x, state = carry
            updates, state = optim.update(jax.grad(lambda x: score(x, y).sum())(x), state)
            return (optax.apply_updates(x, updates), state), None

        (x, _), _ = jax.lax.scan(descend, (x, optim.init(x)), length=num_steps)
        scores[name] = np.asarray(score(x, y))
    return scores


def plot(path, train, reconstructed, generated, scores, energies):
    """Digits beside their reconstructions, generated digits, and energies."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 10), layout="constrained")

    def show(axis, images, title, columns=8):
        images = np.asarray(images)[: columns * columns].reshape(-1, columns, 8, 8)
        framed = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-1)
        framed = np.pad(framed, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=0)  # a thin grey line
        axis.imshow(framed.transpose(0, 2, 1, 3).reshape(-1, columns * 11), cmap="gray_r", vmin=-1, vmax=1)
        axis.set(title=title, xticks=[], yticks=[])

    pairs = np.stack([train[:32], reconstructed[:32]], 1).reshape(-1, 64)
    show(axes[0, 0], pairs, "Training digits, each with its reconstruction to the right")
    for axis, name in ((axes[0, 1], "energy"), (axes[1, 0], "gaussian")):
        show(axis, generated[name], f"Generated under the {name} prior: squared MMD {scores[name]:.1e}")
    everything = np.concatenate(list(energies.values()))
    bins = np.geomspace(max(everything.min(), 1.0), everything.max(), 60)
    for name, values in energies.items():
        axes[1, 1].hist(np.maximum(values, 1.0), bins, alpha=0.7, label=name)
    axes[1, 1].set(
        title="How unlikely is an image?",
        xlabel="lowest energy + misfit over latents (nats)",
        ylabel="images",
        xscale="log",
    )
    axes[1, 1].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(argv=None):
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the split and the fits (default 0)")
    parser.add_argument("--latents", type=int, default=16, help="latent dimensions (default 16)")
    parser.add_argument("--batch-size", type=int, default=256, help="data per step (default 256)")
    parser.add_argument("--num-steps", type=int, default=None, help="steps (default: the package's own)")
    parser.add_argument("--output", default="examples/output/digits.png", help="figure to write")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    args.settings = {} if args.num_steps is None else {"num_steps": args.num_steps}
    return args


if __name__ == "__main__":
    matplotlib.use("Agg")
    main(parse())
