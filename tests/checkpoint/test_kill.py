"""Kill tests: a fit that dies by SIGKILL at any moment goes on to what it would have been, bit for bit.

The file is also the program of the child processes: ``python test_kill.py WHAT DIRECTORY [CALL NUMBER]`` fits, and dies
in the NUMBERth call of the function CALL of ``os`` if it is given.
"""

import os
import random as chance
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen as nn
from jax import random
from numpyro.contrib.module import flax_module

import numpyro_ebipla
from numpyro_ebipla import EBIPLA, EnergyPrior, Persistent
from numpyro_ebipla.checkpoint import latest, list_checkpoints, load

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")


class MLP(nn.Module):
    num_outputs: int = 1

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.num_outputs)(nn.silu(nn.Dense(32)(x)))
        return x[..., 0] if self.num_outputs == 1 else x


def digits(y, batch_size):
    decoder = flax_module("decoder", MLP(64), input_shape=(4,))
    prior = EnergyPrior(flax_module("energy", MLP(), input_shape=(4,)), dist.Normal(0, 1).expand([4]).to_event(1))
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(decoder(x), 0.5).to_event(1), obs=numpyro.subsample(y, event_dim=1))


def tiny(y, batch_size):
    w = numpyro.param("w", 0.1)
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        x = numpyro.sample("x", EnergyPrior(lambda x: w * x**4, dist.Normal(0, 1)))
        numpyro.sample("y", dist.Normal(x, 1), obs=numpyro.subsample(y, event_dim=0))


def load_digits():
    from sklearn.datasets import load_digits

    return jnp.asarray(load_digits().data / 8 - 1, jnp.float32)


SMALL = dict(num_particles=4, num_samples=2, thinning=1, warmup=1)
WHAT = {
    "digits": (EBIPLA(digits, **SMALL), load_digits, dict(batch_size=128, num_steps=600, checkpoint_every=3)),
    "tiny": (
        EBIPLA(tiny, prior=Persistent(16), **SMALL),
        lambda: jnp.linspace(-1.0, 2.0, 20),
        dict(batch_size=8, num_steps=1500, checkpoint_every=5),
    ),
}


def fit(what, directory):
    fitter, data, options = WHAT[what]
    return fitter.run(random.key(0), data(), checkpoint_dir=directory, progress_bar=False, **options)


def die_in(call, number):
    """Make the numberth call of ``os.fsync`` or the like the last thing that this process does."""
    real, calls = getattr(os, call), []

    def dying(*args):
        calls.append(args)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    setattr(os, call, dying)


def start(what, directory, *dying):
    environment = {**os.environ, "PYTHONPATH": str(Path(numpyro_ebipla.__file__).parent.parent)}
    command = [sys.executable, __file__, what, str(directory), *map(str, dying)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_checkpoint(child, directory):
    while child.poll() is None and not (directory.exists() and list_checkpoints(directory)):
        time.sleep(0.02)


def kill(child):
    """Whether it was still alive."""
    alive = child.poll() is None
    child.kill()
    _, said = child.communicate()
    assert child.returncode == (-signal.SIGKILL if alive else 0), said
    return alive


def check(what, directory, whole, expected):
    """All that is taken for a checkpoint is one, and the run goes on to the same fit and the same last file."""
    reached = [load(path).header["step"] for path in list_checkpoints(directory)] if directory.exists() else []
    again = fit(what, directory)
    assert latest(directory).read_bytes() == expected  # state, history and header
    assert [p.name for p in directory.iterdir() if not p.name.startswith("step_")] == []
    np.testing.assert_equal(again.get_samples(), whole.get_samples())
    np.testing.assert_equal(again.history, whole.history)
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    return reached


@pytest.fixture(scope="module")
def whole(tmp_path_factory, request):
    """The uninterrupted fit, and its last checkpoint."""
    directory = tmp_path_factory.mktemp("whole")
    return fit(request.param, directory), latest(directory).read_bytes()


@pytest.mark.parametrize("whole", ["tiny"], indirect=True)
def test_two_kills(tmp_path, whole):
    """One in the midst of a write, then one at another moment of the same run."""
    directory = tmp_path / "killed"
    child = start("tiny", directory, "replace", 4)  # the fourth file is whole, but not renamed yet
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert [load(path).header["step"] for path in list_checkpoints(directory)] == [5, 10, 15]
    assert [p.name[:22] for p in directory.iterdir() if p.name.endswith(".tmp")] == [".step_000000000020.npz"]
    child = start("tiny", directory)
    while child.poll() is None and latest(directory).name < "step_000000000100.npz":
        time.sleep(0.05)
    kill(child)
    reached = check("tiny", directory, *whole)
    assert reached[-1] >= 100


@pytest.mark.slow
@pytest.mark.parametrize("whole", ["digits"], indirect=True)
def test_twenty_kills_at_random_moments(tmp_path, whole):
    """A quarter of them at any moment from the start on (imports, compilation), the others while steps are taken."""
    began = time.monotonic()
    child = start("digits", tmp_path / "other")
    wait_for_checkpoint(child, tmp_path / "other")
    before = time.monotonic() - began
    _, said = child.communicate()
    assert child.returncode == 0, said
    during = time.monotonic() - began - before
    assert latest(tmp_path / "other").read_bytes() == whole[1]  # the same in another process

    draw, moments = chance.Random(0), []
    for i in range(20):
        directory = tmp_path / f"killed{i}"
        child = start("digits", directory)
        if i % 4:
            wait_for_checkpoint(child, directory)
        time.sleep(draw.uniform(0, during if i % 4 else before))
        alive = kill(child)
        unfinished = directory.exists() and any(p.name.endswith(".tmp") for p in directory.iterdir())
        reached = check("digits", directory, *whole)
        moments.append((alive, reached[-1] if reached else 0, unfinished))
    print(f"first checkpoint after {before:.0f} s, the rest {during:.0f} s; (alive, step, unfinished file): {moments}")
    assert sum(alive for alive, *_ in moments) >= 15


@pytest.mark.slow
@pytest.mark.parametrize("whole", ["tiny"], indirect=True)
@pytest.mark.parametrize("call", ["fsync", "replace", "unlink"])
@pytest.mark.parametrize("number", [1, 4])
def test_a_kill_at_every_stage_of_a_write(tmp_path, whole, call, number):
    directory = tmp_path / "killed"
    child = start("tiny", directory, call, number)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    check("tiny", directory, *whole)


if __name__ == "__main__":
    if sys.argv[3:]:
        die_in(sys.argv[3], int(sys.argv[4]))
    fit(sys.argv[1], sys.argv[2])
