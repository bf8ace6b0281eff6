"""Images: an energy prior under a small convolutional generator, with the default settings.

MNIST or the like from a file, or without one scikit-learn's digits, scaled up to 16×16:

    python examples/images.py
    python examples/images.py --data mnist.npz --latents 32 --num-steps 5000

Files are .npz (an array "images", or the first one), .npy, or MNIST's own idx format, also gzipped: arrays
[n, height, width] of bytes, or of floats from 0 to 1, with sides that 4 divides. It writes four pictures: generated
images, held-out images beside their reconstructions, interpolations between particles, and the history.
"""

import argparse
import gzip
import time
from pathlib import Path

import jax
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import linen as nn
from jax import random
from numpyro.contrib.module import flax_module

from numpyro_ebipla import EBIPLA, EnergyPrior
from numpyro_ebipla.plots import plot_history, plot_images, plot_interpolation, plot_reconstructions

NOISE = 0.3  # of a pixel, on the scale from −1 to 1


class Generator(nn.Module):
    """A dense layer and two transposed convolutions, each of which doubles the sides."""

    shape: tuple[int, int]
    width: int

    @nn.compact
    def __call__(self, x):
        height, width = self.shape
        x = nn.silu(nn.Dense(height // 4 * (width // 4) * 2 * self.width)(x))
        x = x.reshape(*x.shape[:-1], height // 4, width // 4, 2 * self.width)
        x = nn.silu(nn.ConvTranspose(self.width, (4, 4), (2, 2))(x))
        return nn.tanh(nn.ConvTranspose(1, (4, 4), (2, 2))(x))[..., 0]


class Energy(nn.Module):
    """Two hidden layers of 128."""

    @nn.compact
    def __call__(self, x):
        for width in (128, 128):
            x = nn.silu(nn.Dense(width)(x))
        return nn.Dense(1)(x)[..., 0]


def make_model(shape, num_latents, width):
    """The model of bytes [n, height, width], which are scaled a minibatch at a time."""

    def model(images=None, num_data=1, batch_size=None):
        generator = flax_module("generator", Generator(shape, width), input_shape=(num_latents,))
        energy = flax_module("energy", Energy(), input_shape=(num_latents,))
        base = dist.Normal(0, 1).expand([num_latents]).to_event(1)
        with numpyro.plate("data", num_data if images is None else len(images), subsample_size=batch_size):
            x = numpyro.sample("x", EnergyPrior(energy, base))
            batch = None if images is None else numpyro.subsample(images, event_dim=2) / 127.5 - 1
            numpyro.sample("image", dist.Normal(generator(x), NOISE).to_event(2), obs=batch)

    return model


def load(path, limit, seed):
    """Bytes [n, height, width]: nine tenths to train on, the rest held out."""
    if path is None:
        from sklearn.datasets import load_digits

        images = load_digits().images * (255 / 16)
        images = np.asarray(jax.image.resize(images, (len(images), 16, 16), "linear"))
    else:
        images = read(Path(path))
        if images.dtype != np.uint8:
            images = images * 255
    if images.ndim != 3 or any(side % 4 for side in images.shape[1:]):
        raise SystemExit(f"{path}: images must be [n, height, width] with sides that 4 divides, got {images.shape}.")
    images = images.astype(np.uint8)[np.random.RandomState(seed).permutation(len(images))[:limit]]
    cut = len(images) * 9 // 10
    return images[:cut], images[cut:]


def read(path):
    """The array of a file."""
    if not path.exists():
        raise SystemExit(f"{path}: there is no such file.")
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".npz":
        arrays = np.load(path)
        return arrays["images" if "images" in arrays else arrays.files[0]]
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise SystemExit(f"{path}: neither .npz, .npy nor an idx file of bytes.")
    shape = tuple(np.frombuffer(raw, ">i4", raw[3], 4).tolist())
    if len(raw) != 4 + 4 * raw[3] + np.prod(shape):
        raise SystemExit(f"{path}: cut off, or not the images that its head says: {shape}.")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def main(args):
    """Fit, print and plot."""
    train, held_out = load(args.data, args.limit, args.seed)
    shape, out = train.shape[1:], Path(args.output_dir)
    ebipla = EBIPLA(make_model(shape, args.latents, args.width), num_particles=args.particles)
    start = time.time()
    fit = ebipla.run(
        random.key(args.seed),
        train,
        batch_size=args.batch_size,
        num_steps=args.num_steps,
        num_samples=0,  # posteriors of all images are not wanted; fit.collect has them
        progress_bar=not args.quiet,
    )
    passes = len(fit.losses) * args.batch_size / len(train)
    print(f"{len(train)} images of {shape}: {len(fit.losses)} steps, {passes:.0f} epochs, {time.time() - start:.0f} s")

    x = fit.energy_prior("x").sample(random.key(1), (36,))
    generated = Generator(shape, args.width).apply({"params": fit.params["generator$params"]}, x)
    shown = held_out[:32]
    found = ebipla.reconstruct(random.key(2), fit.params, shown)["image"]
    shown = shown / 127.5 - 1
    error, of_mean = (((image - shown) ** 2).mean() for image in (found, (train / 127.5 - 1).mean(0)))
    log_z, log_z_error = fit.log_normalizer("x")
    print(
        f"held-out squared error {error:.3f} (of the mean image {of_mean:.3f}); log Z {log_z:.2f} ± {log_z_error:.2f}"
    )

    out.mkdir(parents=True, exist_ok=True)
    scale = {"vmin": -1, "vmax": 1}
    pictures = {
        "generated": plot_images(generated, **scale).figure,
        "reconstructed": plot_reconstructions(shown, found, num_images=32, **scale).figure,
        "interpolated": plot_interpolation(fit, [(2 * i, 2 * i + 1) for i in range(5)], **scale).figure,
        "history": plot_history(fit),
    }
    for name, figure in pictures.items():
        figure.savefig(out / f"{name}.png", dpi=110)
        print(f"figure: {out / f'{name}.png'}")


def parse(argv=None):
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None, help="file of images (default: scikit-learn's digits)")
    parser.add_argument("--limit", type=int, default=8000, help="images to use, at most (default 8000)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the fit (default 0)")
    parser.add_argument("--latents", type=int, default=16, help="latent dimensions (default 16)")
    parser.add_argument("--width", type=int, default=16, help="channels of the generator (default 16)")
    parser.add_argument("--particles", type=int, default=2, help="particles of each image (default 2)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step (default 64)")
    parser.add_argument("--num-steps", type=int, default=700, help="steps (default 700)")
    parser.add_argument("--output-dir", default="examples/output", help="for the pictures (default examples/output)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


if __name__ == "__main__":
    matplotlib.use("Agg")
    main(parse())
