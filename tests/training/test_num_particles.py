"""The number of particles follows from the number of data and from what a chain costs."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_ebipla.model.inspection import count_operations, inspect_model
from numpyro_ebipla.training.num_particles import OPERATIONS, choose_num_particles

pytestmark = pytest.mark.unit
NUM_DATA, LATENTS, PIXELS = 4000, 4, 6


def decoder(width, batch_size=None):
    """What an inspection finds of a decoder with two hidden layers."""
    sizes = (LATENTS, width, width, PIXELS)

    def model(y, batch_size=None):
        draw = lambda i: random.normal(random.key(i), sizes[i : i + 2]) / sizes[i] ** 0.5
        weights = [numpyro.param(f"w{i}", lambda _, i=i: draw(i)) for i in range(3)]
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            x = numpyro.sample("x", dist.Normal(0, 1).expand([LATENTS]).to_event(1))
            for w in weights:
                x = jax.nn.relu(x @ w)
            numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=numpyro.subsample(y, event_dim=1))

    y = np.zeros((NUM_DATA, PIXELS), np.float32)
    return inspect_model(model, random.key(0), (jnp.asarray(y),), {"batch_size": batch_size})


@pytest.mark.parametrize("width", [64, 256])
def test_operations_are_those_of_the_products(width):
    """Two for each weight and datum of a minibatch; the few others count, too."""
    products = 2 * 100 * (LATENTS * width + width * width + width * PIXELS)
    assert products < count_operations(decoder(width, 100)) < 1.1 * products


@pytest.mark.parametrize(
    ("width", "batch_size", "expected"),
    [
        (64, 100, 20),  # 2000 chains
        (64, None, 4),  # the fewest
        (256, 100, 16),
        (1024, 100, 1),  # 2.1e8 for one
        (1024, 10, 10),
        (4096, 100, 1),
    ],
)
def test_dear_chains_are_few(width, batch_size, expected):
    found = decoder(width, batch_size)
    assert choose_num_particles(found) == expected
    assert expected == 1 or expected * count_operations(found) <= OPERATIONS


def mixed(number, size, framed):
    """What an inspection finds of a mixed model in long format, or of the same without a plate."""

    event = [size] if framed else [number, size]

    def model(g, y):
        with numpyro.plate("groups", number) if framed else nullcontext():
            u = numpyro.sample("u", dist.Normal(0, numpyro.param("s", 1.0)).expand(event).to_event(len(event)))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(u[g].sum(-1), 1.0), obs=y)

    g = jnp.asarray(np.arange(2 * number) % number)
    return inspect_model(model, random.key(0), (g, jnp.zeros(2 * number)), {})


@pytest.mark.parametrize(
    ("number", "size", "framed", "expected"),
    [
        (6, 1, True, 64),
        (40, 1, True, 160),  # four to a coordinate
        (500, 1, True, 64),  # ten to each field that groups share
        (500, 2, True, 200),
        (500, 1, False, 256),  # a process, for all that is known
        (50, 10, True, 256),  # too many fields
    ],
)
def test_groups_that_share_control_variates_need_fewer(number, size, framed, expected):
    assert choose_num_particles(mixed(number, size, framed)) == expected
