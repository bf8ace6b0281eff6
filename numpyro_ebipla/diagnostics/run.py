"""What a run has said of itself: its history and its draws."""

from collections.abc import Collection

import numpy as np
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

from numpyro_ebipla._core.tree import spaced
from numpyro_ebipla.diagnostics.checks import MORE_STEPS, Check, Rule
from numpyro_ebipla.kernels.base import AbstractKernel
from numpyro_ebipla.kernels.mala import MALA
from numpyro_ebipla.training.collect import Draws

#: Draws after which a particle that has not moved is taken to be stuck.
FROZEN_DRAWS = 50
#: Draws below which there is no R-hat, whose halves need two each.
FEWEST_DRAWS = 4
#: Scalars of a site over which R-hat and ESS are computed, at most.
MAX_DIAGNOSED = 1000
STILL = "moves are refused: the walkers stand still"
#: Of the walkers, by the last part of their entry in the history.
OF_WALKERS = {
    "accept": Rule("walkers' acceptance", 0.3, "moves are taken", STILL, "a smaller step_size", is_least=True),
    "ess": Rule(
        "walkers' ESS / P",
        0.2,
        "walkers follow the energy",
        "few walkers carry all the weight",
        "more num_walkers or num_moves in prior=Persistent(…), or prior=Tempered()",
        is_least=True,
    ),
    "resampled": Rule(
        "resamplings per step",
        0.2,
        "walkers follow the energy",
        "the energy moves faster than its walkers",
        "a lower rate of the energy, or more num_moves",
    ),
    "swap": Rule(
        "lowest swap rate",
        0.1,
        "walkers come from the base",
        "walkers hardly come from the base",
        "prior=Tempered(num_rungs=16)",
        is_least=True,
    ),
    "barrier": Rule(
        "barrier",
        4.0,
        "the ladder reaches the prior",
        "the energy is too sharp for the ladder, and held back",
        "prior=Tempered(num_rungs=16, restraint=(4.0, 6.0))",
        slight=1.1,
    ),
    "gap": Rule(
        "energy gap",
        0.5,
        "particles and walkers have the same energy",
        "particles and walkers differ in energy: the prior is not done",
        MORE_STEPS,
    ),
}
#: Of weighted particles, whose entries name no site.
OF_WEIGHTS = {
    "ess": Rule(
        "particles' ESS / N",
        0.2,
        "particles follow the parameters",
        "few particles carry all the weight",
        "more num_particles, or a lower rate of the parameters",
        is_least=True,
    ),
    "resampled": Rule(
        "particles' resamplings per step",
        0.2,
        "particles follow the parameters",
        "the parameters move faster than the particles",
        "more num_particles, or a lower rate of the parameters",
    ),
}
BRAKE = Rule(
    "brake",
    0.5,
    "the energy moves freely",
    "the energy is held back, as its walkers cannot follow: it is not done",
    MORE_STEPS,
    is_least=True,
)
#: Entries of the history that may be infinite in a sound step: the parameters' gradient is cut before it is used.
MAY_OVERFLOW = ("log_z", "grad_norm")
FINITE_STEPS = Rule(
    "non-finite steps",
    0,
    "every step was finite",
    "the fit diverged and holds its last sound state",
    "a lower learning rate, or the default chains",
)
FINITE_DRAWS = Rule(
    "non-finite draws",
    0,
    "every draw is finite",
    "the model's densities overflow at the fitted parameters",
    "looking at fit.draws.log_density",
)
LONGER = "larger warmup, thinning or num_samples; where posteriors have several modes, EBIPLA.infer"
R_HAT = Rule("R-hat", 1.1, "the particles agree", "the particles disagree", LONGER, slight=1.1)
ESS = Rule("ESS", 50, "enough for means and sds", "too few for a posterior mean", LONGER, is_least=True)
FROZEN = Rule(
    "frozen",
    0,
    "every particle moves",
    "as many scalars of particles never changed",
    "more num_steps, or larger warmup",
)
TIES = Rule(
    "ties",
    1e-3,
    "values are told apart",
    "this precision cannot tell values apart where particles lie: a bias",
    "double precision (numpyro.enable_x64() and float64 data), or other units of this latent",
)
ACCEPTANCE = Rule(
    "acceptance",
    0.3,
    "moves are taken",
    "moves are refused: the particles stand still",
    "warmup=500",
    is_least=True,
)


def check_history(history: dict[str, np.ndarray], diverged: bool) -> list[Check]:
    """Check what the steps reported, over the last tenth of them."""
    judged = [v for k, v in history.items() if k.rpartition("/")[2] not in MAY_OVERFLOW]
    faulty = sum(int((~np.isfinite(v)).sum()) for v in judged) + diverged
    checks = [FINITE_STEPS.judge(faulty)]
    tail = {name: float(np.mean(v[-max(1, len(v) // 10) :])) for name, v in history.items() if len(v)}
    for name, value in tail.items():
        site, _, what = name.rpartition("/")
        rules = OF_WALKERS if site else OF_WEIGHTS
        if what in rules:
            checks.append(rules[what].judge(abs(value), site))
    if "brake" in tail:
        checks.append(BRAKE.judge(tail["brake"]))
    return checks


def check_draws(draws: Draws, kernel: AbstractKernel, latents: Collection[str]) -> list[Check]:
    """Check the collected draws: finite, mixed, all of them moving, accepted at a sound rate."""
    samples = {name: draws.samples[name] for name in latents if name in draws.samples}
    bad = sum(int((~np.isfinite(x)).sum()) for x in [*samples.values(), draws.log_density])
    checks, samples = [FINITE_DRAWS.judge(bad)], {} if bad else samples
    for name, values in samples.items():
        if values.shape[1] < FEWEST_DRAWS:
            continue
        flat = values.reshape((*values.shape[:2], -1))
        some = flat[..., spaced(flat.shape[-1], MAX_DIAGNOSED)].astype(np.float64)
        some = some[..., np.ptp(some, axis=(0, 1)) > 0]
        with np.errstate(divide="ignore", invalid="ignore"):
            r_hat = np.max(split_gelman_rubin(some), initial=1.0)
            n_eff = np.min(effective_sample_size(some), initial=np.inf)
        found = {R_HAT: r_hat, ESS: n_eff, FROZEN: _frozen(flat), TIES: _ties(some)}
        checks += [rule.judge(value, name) for rule, value in found.items()]
    if isinstance(kernel, MALA):
        for block, values in draws.accept.items():
            rule = ACCEPTANCE._replace(name=block.replace("accept_", "acceptance, "))
            checks.append(rule.judge(values.mean()))
    return checks


def _frozen(draws: np.ndarray) -> int:
    """Count chains ``[particle, draw, scalar]`` that never moved, but for scalars that are the same in all particles.

    Those are constants by construction, as the first element of a Cholesky factor of correlations is.
    """
    if draws.shape[1] < FROZEN_DRAWS:
        return 0
    chains = (draws == draws[:, :1]).all(1)
    if len(draws) > 1:
        chains = chains & ~(chains.all(0) & (draws[:, 0] == draws[:1, 0]).all(0))
    return int(chains.sum())


def _ties(draws: np.ndarray) -> float:
    """Return the share of pairs of particles that have the very same value, ``[particle, draw, scalar]``, at its worst.

    Close to the edge of a support single precision has few values left: there are none between 1 − 6e-8 and 1. Where
    values are spaced evenly by u, and spread by σ, it is 0.28 u/σ, and rounding adds (u/σ)²/12 to the variance.
    """
    number = len(draws)
    if number < 2 or not draws.size:
        return 0.0
    ordered = np.sort(draws, axis=0)
    before, equal = np.zeros(draws.shape[1:], np.int64), np.zeros(draws.shape[2], np.int64)
    for same in ordered[1:] == ordered[:-1]:
        before = (before + 1) * same  # so many are equal to this one and stand before it
        equal += before.sum(0)
    return float(equal.max() / (number * (number - 1) / 2 * len(before)))
