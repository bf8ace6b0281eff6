"""Data that lie on several devices: the same fit, its particles beside their data."""

import os
import subprocess
import sys

import pytest

# XLA decides on the number of its devices when JAX starts, so this is a process of its own.
PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist
from jax import random
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpyro_ebipla import EBIPLA, EnergyPrior

jax.config.update("jax_enable_x64", True)
assert jax.device_count() == 2

def model(y, batch_size=None):
    w, shift = numpyro.param("w", 0.1 * jnp.ones(3)), numpyro.param("shift", 0.0)
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        x = numpyro.sample("x", EnergyPrior(lambda x: jnp.sin(w * x[..., None]).sum(-1), dist.Normal(0, 1)))
        numpyro.sample("y", dist.Normal(x + shift, 1), obs=numpyro.subsample(y, event_dim=0))

y = 1 + 2 * random.normal(random.key(1), (40,))
by_datum = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
ebipla = EBIPLA(model, num_particles=4, num_samples=5)
run = lambda y: ebipla.run(random.key(0), y, batch_size=BATCH_SIZE, num_steps=50, progress_bar=False)
one, two = run(y), run(jax.device_put(y, by_datum))
for a, b in ((one.params, two.params), (one.get_samples(), two.get_samples()), (one.history, two.history)):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), a, b)
if BATCH_SIZE is None:
    particles = two.state.posterior.local["x"]
    assert particles.sharding.shard_shape(particles.shape) == (4, 20), particles.sharding
new = ebipla.log_likelihood(random.key(1), one.params, jax.device_put(y, by_datum))
np.testing.assert_allclose(new.value, ebipla.log_likelihood(random.key(1), one.params, y).value, rtol=1e-7)
print("equal")
"""


@pytest.mark.parametrize("batch_size", [pytest.param(None, marks=pytest.mark.slow), 10])
def test_data_on_two_devices(batch_size):
    """Sums over data are in another order, no more: in double precision 50 steps agree to rounding."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("BATCH_SIZE", repr(batch_size))],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "equal"
