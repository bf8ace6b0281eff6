"""Log-likelihoods of held-out digits and the bidirectional gap: ``python -m benchmarks.likelihood --help``.

Fits the latent energy model of ``examples/digits.py`` to most of the digits, then prints for held-out ones the mean of
``log p(y)`` with its standard error and effective sample sizes, and for as many simulated ones the gap between
annealing forwards and backwards, for ladders of increasing fineness.
"""

import argparse
import time

import jax
import numpy as np
from jax import random
from sklearn.datasets import load_digits

from examples.digits import make_model
from numpyro_ebipla import EBIPLA, Annealing


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--latents", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pixels = load_digits().data.astype(np.float32) / 8 - 1
    pixels = np.random.default_rng(args.seed).permutation(pixels)
    train, test = pixels[args.held_out :], pixels[: args.held_out]
    ebipla = EBIPLA(make_model(args.latents, energy_based=True), num_steps=args.steps, num_samples=1)
    fit = ebipla.run(random.key(args.seed), train, batch_size=200)
    print(f"{jax.devices()[0].device_kind}; {args.latents} latents, {args.steps} steps")
    for fineness in (0.9, 0.98):
        start = time.perf_counter()
        options = {"num_particles": args.particles, "annealing": Annealing(stage_ess=fineness, max_temps=1000)}
        out = ebipla.log_likelihood(random.key(1), fit.params, test, **options)
        total, error = (float(x) / len(test) for x in out.total)
        print(
            f"stage_ess {fineness}: held-out log p {total:.3f} ± {error:.3f} nats per digit (of which log Z "
            f"{float(out.log_z_error.mean()):.3f}); std_error of one digit, median {np.median(out.std_error):.3f}; "
            f"ess, median {np.median(out.ess):.0f}, least {np.min(out.ess):.0f}; {time.perf_counter() - start:.0f} s"
        )
        start = time.perf_counter()
        gap = np.asarray(ebipla.bidirectional(random.key(2), fit.params, test, **options).gap)
        print(
            f"stage_ess {fineness}: bidirectional gap of {len(gap)} simulated digits {gap.mean():.3f} ± "
            f"{gap.std() / np.sqrt(len(gap)):.3f} nats; {time.perf_counter() - start:.0f} s"
        )


if __name__ == "__main__":
    main()
