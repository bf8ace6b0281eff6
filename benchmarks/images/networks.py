"""Generator, encoder and energy: those of 2006.08205 and 2510.12311 in kind, ``width`` scales them down."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import linen as nn
from numpyro.contrib.module import flax_module

from numpyro_ebipla import EnergyPrior

#: Noise of a pixel on the scale from −1 to 1, and hidden units of the energy (2006.08205).
NOISE, HIDDEN = 0.3, 200


class Generator(nn.Module):
    """A dense layer, then transposed convolutions that double the sides, up to a tanh."""

    shape: tuple[int, int, int]
    width: int

    @nn.compact
    def __call__(self, x):
        height, width, channels = self.shape
        doublings = num_doublings(height)
        first = (height >> doublings, width >> doublings, self.width << (doublings - 1))
        x = nn.relu(nn.Dense(int(np.prod(first)), param_dtype=x.dtype)(x)).reshape(*x.shape[:-1], *first)
        for i in reversed(range(doublings - 1)):
            x = nn.relu(nn.ConvTranspose(self.width << i, (4, 4), (2, 2), param_dtype=x.dtype)(x))
        return nn.tanh(nn.ConvTranspose(channels, (4, 4), (2, 2), param_dtype=x.dtype)(x))


class Encoder(nn.Module):
    """Convolutions that halve the sides, then the mean and log standard deviation of the latents."""

    shape: tuple[int, int, int]
    num_latents: int
    width: int

    @nn.compact
    def __call__(self, y):
        for i in range(num_doublings(self.shape[0])):
            y = nn.relu(nn.Conv(self.width << i, (4, 4), (2, 2))(y))
        out = nn.Dense(2 * self.num_latents)(y.reshape(*y.shape[:-3], -1))
        return jnp.split(out, 2, -1)


class Energy(nn.Module):
    """Two hidden layers."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.gelu(nn.Dense(HIDDEN)(x))
        return nn.Dense(1)(x)[..., 0]


def num_doublings(side: int) -> int:
    """From 7 or 8 pixels to 28 or 32, from 8 to 64."""
    return 3 if side >= 64 else 2


def scaled(images):
    """From bytes to the range of the generator."""
    return images / 127.5 - 1


def make_model(shape, num_latents, width, energy_based=True):
    """The model of bytes ``[n, height, width, channels]``, with an energy prior or a Gaussian one."""

    def model(images, batch_size=None):
        generator = flax_module("generator", Generator(shape, width), input_shape=(num_latents,))
        prior = dist.Normal(0, 1).expand([num_latents]).to_event(1)
        if energy_based:
            prior = EnergyPrior(flax_module("energy", Energy(), input_shape=(num_latents,)), prior)
        with numpyro.plate("data", len(images), subsample_size=batch_size):
            x = numpyro.sample("x", prior)
            seen = scaled(numpyro.subsample(images, event_dim=3))
            numpyro.sample("image", dist.Normal(generator(x), NOISE).to_event(3), obs=seen)

    return model


def make_guide(shape, num_latents, width):
    """The encoder's guide."""

    def guide(images, batch_size=None):
        encoder = flax_module("encoder", Encoder(shape, num_latents, width), input_shape=shape)
        with numpyro.plate("data", len(images), subsample_size=batch_size):
            mean, log_sd = encoder(scaled(numpyro.subsample(images, event_dim=3)))
            numpyro.sample("x", dist.Normal(mean, jnp.exp(log_sd)).to_event(1))

    return guide
