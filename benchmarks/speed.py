"""Speed, as ratios of medians of alternating runs in one process: ``python -m benchmarks.speed`` (``make bench``).

* our step against a hand-written JAX loop of the same step (checked to give the same numbers), for ULA and MALA,
  on the Swiss roll, on digits, and on images under transposed convolutions (against jitted steps called one by one,
  in which XLA's convolutions are fastest on a CPU);
* our step against NumPyro's SVI with the same generator and an encoder;
* our step at a million data against a thousand.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import linen as nn
from jax import random
from numpyro.contrib.module import flax_module
from numpyro.infer import SVI, Trace_ELBO
from sklearn.datasets import load_digits

from benchmarks.handwritten import make_run
from benchmarks.images.networks import Generator
from numpyro_ebipla import EBIPLA, MALA, ULA, EnergyPrior, Persistent

STEPS = 100


class MLP(nn.Module):
    """Two hidden layers of 128 (or none); the last axis is dropped if there is one output."""

    num_outputs: int = 1
    hidden: tuple[int, ...] = (128, 128)

    @nn.compact
    def __call__(self, x):
        for width in self.hidden:
            x = nn.silu(nn.Dense(width, param_dtype=x.dtype)(x))
        x = nn.Dense(self.num_outputs, param_dtype=x.dtype)(x)
        return x[..., 0] if self.num_outputs == 1 else x


class Flat(nn.Module):
    """The images benchmark's generator, with its 784 pixels in a row."""

    @nn.compact
    def __call__(self, x):
        return Generator((28, 28, 1), 16)(x).reshape(*x.shape[:-1], 784)


def make_model(num_latents, decoder, sigma, batch_size):
    """Energy prior, MLP energy, the decoder given."""

    def model(y):
        energy = flax_module("energy", MLP(), input_shape=(num_latents,))
        generator = flax_module("decoder", decoder, input_shape=(num_latents,))
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            prior = EnergyPrior(energy, dist.Normal(0, 1).expand([num_latents]).to_event(1))
            x = numpyro.sample("x", prior)
            y = numpyro.subsample(y, event_dim=1)
            numpyro.sample("y", dist.Normal(generator(x), sigma).to_event(1), obs=y)

    return model


def median_times(runs, repeats):
    """Median seconds of each callable, called in turn."""
    times = np.zeros((repeats, len(runs)))
    for i in range(repeats):
        for j, run in enumerate(runs):
            start = time.perf_counter()
            run()
            times[i, j] = time.perf_counter() - start
    return np.median(times, axis=0)


class Runner:
    """Holds a state and advances it by STEPS at each call."""

    def __init__(self, advance, state):
        self.advance, self.state = advance, state
        self()  # compile

    def __call__(self):
        self.state = jax.block_until_ready(self.advance(self.state))


def ours(ebipla, y, seed=0):
    """A runner of the package's own jitted chunk, as ``EBIPLA.run`` uses it, and its initial state."""
    state = ebipla.init(random.key(seed), y)
    call = ebipla._systems.read((y,), {})
    system, data = ebipla._systems.of(call), call.data
    return Runner(lambda s: system.run_chunk(s, data, jnp.asarray(STEPS, jnp.int32))[0], copy(state)), state


def copy(state):
    """Fresh buffers, as the loops donate theirs."""
    return jax.tree.map(jnp.copy, state)


def two_loops(y, num_latents, decoder, sigma, batch_size, adjusted):
    """Our loop and the hand-written one as functions ``(state, num_steps) -> state``, with equal initial states."""
    h = 1e-4
    kernel = MALA() if adjusted else ULA(h)
    optim = optax.adam(1e-3)
    ebipla = EBIPLA(
        make_model(num_latents, decoder, sigma, batch_size),
        num_particles=4,
        kernel=kernel,
        prior=Persistent(num_walkers=1000, kernel=kernel),
        optim=optim,
    )
    state = ebipla.init(random.key(0), y)
    call = ebipla._systems.read((y,), {})
    system, data = ebipla._systems.of(call), call.data

    def energy(params, x):
        return MLP().apply({"params": params}, x)

    def generate(params, x):
        return decoder.apply({"params": params}, x)

    run = make_run(energy, generate, sigma, optim, batch_size, adjusted, h, by_step=isinstance(decoder, Flat))
    walkers = state.prior["x"]
    fresh = jnp.ones(num_latents), jnp.eye(num_latents), jnp.zeros((), jnp.int32)
    start = {
        "step": state.step,
        "key": state.rng_key,
        "params": state.params,
        "average": state.average,
        "optim": optim.init(state.params),
        "x": state.posterior.local["x"],
        "walkers": walkers.position,
        "by_datum": tuple(state.posterior.adapt_local.by_datum) if adjusted else None,
        "adapt_x": (state.posterior.adapt_local.log_step, *fresh),
        "adapt_w": (walkers.adapt.log_step, *fresh),
    }
    mine = lambda s, n: system.run_chunk(s, data, jnp.asarray(n, jnp.int32))[0]
    hand = lambda s, n: run(s, y, n)[0]
    return (mine, copy(state)), (hand, copy(start))


def disagreement(y, *case):
    """Largest difference between the two loops after 30 steps, in double precision.

    In single precision rounding decides an acceptance now and then.
    """
    with jax.enable_x64(True):
        (mine, a), (hand, b) = two_loops(jnp.asarray(np.asarray(y), jnp.float64), *case)
        a, b = mine(a, 30), hand(b, 30)
        pairs = [(a.params, b["params"]), (a.posterior.local["x"], b["x"]), (a.prior["x"].position, b["walkers"])]
        leaves = zip(*map(jax.tree.leaves, zip(*pairs, strict=True)), strict=True)
        return max(float(jnp.abs(p - q).max()) for p, q in leaves)


def against_handwritten(name, y, *case, repeats):
    """Ratio of our step to the hand-written one, after checking that they agree."""
    worst = disagreement(y, *case)
    assert worst < 1e-6, f"{name}: the two loops differ by {worst}"
    runners = [Runner(lambda s, f=f: f(s, STEPS), state) for f, state in two_loops(y, *case)]
    one, other = median_times(runners, repeats)
    report(f"{name}, against hand-written", one, other, f"≤ 1.10   (30 steps in x64 agree to {worst:.0e})")


def against_svi(name, y, num_latents, decoder, sigma, batch_size, repeats):
    """Ratio of the default step to SVI's with the same generator and an encoder."""
    mine, _ = ours(EBIPLA(make_model(num_latents, decoder, sigma, batch_size), num_particles=4), y)

    def model(y):
        generator = flax_module("decoder", decoder, input_shape=(num_latents,))
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            x = numpyro.sample("x", dist.Normal(0, 1).expand([num_latents]).to_event(1))
            y = numpyro.subsample(y, event_dim=1)
            numpyro.sample("y", dist.Normal(generator(x), sigma).to_event(1), obs=y)

    def guide(y):
        encoder = flax_module("encoder", MLP(2 * num_latents), input_shape=(y.shape[-1],))
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            out = encoder(numpyro.subsample(y, event_dim=1))
            loc, scale = out[..., :num_latents], jnp.exp(out[..., num_latents:])
            numpyro.sample("x", dist.Normal(loc, scale).to_event(1))

    svi = SVI(model, guide, optax.adam(1e-3), Trace_ELBO())

    @jax.jit
    def advance(state):
        return jax.lax.fori_loop(0, STEPS, lambda i, s: svi.update(s, y)[0], state)

    one, other = median_times([mine, Runner(advance, svi.init(random.key(0), y))], repeats)
    report(f"{name}, default against SVI", one, other, "")


def against_size(repeats):
    """Ratio of a step at M = 10⁶ to one at M = 10³."""
    runners = []
    for num_data in (1_000_000, 1_000):
        y = random.normal(random.key(1), (num_data, 32))
        model = make_model(16, MLP(32), 0.5, 256)
        runners.append(ours(EBIPLA(model, num_particles=4), y)[0])
    one, other = median_times(runners, repeats)
    report("M = 10⁶ against 10³ (B 256, N 4, d 16)", one, other, "≤ 1.30")


def report(name, one, other, target):
    """One line of the table."""
    print(f"{name:46}{1e3 * one / STEPS:9.2f}{1e3 * other / STEPS:9.2f}{one / other:8.2f}   {target}", flush=True)


def main(argv=None):
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help=f"timed rounds of {STEPS} steps each (default 9)")
    args = parser.parse_args(argv)
    key = random.key(0)
    t = random.uniform(key, (4000,), minval=1.5 * np.pi, maxval=4.5 * np.pi)
    rotation = jnp.linalg.qr(random.normal(key, (10, 2)))[0]
    roll = jnp.stack([t * jnp.cos(t), t * jnp.sin(t)], -1) / 7 @ rotation.T
    digits = jnp.asarray(load_digits().data / 8 - 1, jnp.float32)
    cases = (
        ("Swiss roll", roll, 2, MLP(10, ()), 0.1, 500),
        ("digits", digits, 16, MLP(64), 0.25, 256),
    )
    images = jnp.tanh(random.normal(key, (1000, 784)))
    print(f"{'milliseconds per step':46}{'ours':>9}{'other':>9}{'ratio':>8}   target")
    for case in cases:
        for adjusted in (False, True):
            name = f"{case[0]}, {'MALA' if adjusted else 'ULA'}"
            against_handwritten(name, *case[1:], adjusted, repeats=args.repeats)
    case = (images, 32, Flat(), 0.3, 64, False)
    against_handwritten("images 28×28, ULA", *case, repeats=-(-args.repeats // 3))
    for case in cases:
        against_svi(*case, args.repeats)
    against_size(args.repeats)


if __name__ == "__main__":
    main()
