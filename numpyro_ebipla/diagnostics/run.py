"""What a run has said of itself: its history and its draws."""

from collections.abc import Callable, Collection

import numpy as np
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

from numpyro_ebipla._core.tree import spaced
from numpyro_ebipla.diagnostics.checks import MORE_STEPS, Check, at_least, at_most
from numpyro_ebipla.kernels.base import AbstractKernel
from numpyro_ebipla.kernels.mala import MALA
from numpyro_ebipla.training.collect import Draws

#: Draws after which a particle that has not moved is taken to be stuck.
FROZEN_DRAWS = 50
#: Share of draws that may have the value of another particle, see :func:`_ties`.
MOST_TIES = 1e-3
#: Scalars of a site over which R-hat and ESS are computed, at most.
MAX_DIAGNOSED = 1000
#: ``(title, check, limit, (verdict if passed, if not), remedy)`` of an entry of the history.
Row = tuple[str, Callable[..., Check], float, tuple[str, str], str]
#: Of the walkers, by energy site.
OF_WALKERS: dict[str, Row] = {
    "accept": (
        "walkers' acceptance",
        at_least,
        0.3,
        ("moves are taken", "moves are refused: the walkers stand still"),
        "a smaller step_size",
    ),
    "ess": (
        "walkers' ESS / P",
        at_least,
        0.2,
        ("walkers follow the energy", "few walkers carry all the weight"),
        "more num_walkers or num_moves in prior=Persistent(…), or prior=Tempered()",
    ),
    "resampled": (
        "resamplings per step",
        at_most,
        0.2,
        ("walkers follow the energy", "the energy moves faster than its walkers"),
        "a lower rate of the energy, or more num_moves",
    ),
    "swap": (
        "lowest swap rate",
        at_least,
        0.1,
        ("walkers come from the base", "walkers hardly come from the base"),
        "prior=Tempered(num_rungs=16)",
    ),
    "barrier": (
        "barrier",
        at_most,
        4.0,
        ("the ladder reaches the prior", "the energy is too sharp for the ladder, and held back"),
        "prior=Tempered(num_rungs=16, restraint=(4.0, 6.0))",
    ),
    "gap": (
        "energy gap",
        at_most,
        0.5,
        ("particles and walkers have the same energy", "particles and walkers differ in energy: the prior is not done"),
        MORE_STEPS,
    ),
}
#: Likewise of weighted particles, whose entries name no site.
OF_WEIGHTS: dict[str, Row] = {
    "ess": (
        "particles' ESS / N",
        at_least,
        0.2,
        ("particles follow the parameters", "few particles carry all the weight"),
        "more num_particles, or a lower rate of the parameters",
    ),
    "resampled": (
        "particles' resamplings per step",
        at_most,
        0.2,
        ("particles follow the parameters", "the parameters move faster than the particles"),
        "more num_particles, or a lower rate of the parameters",
    ),
}
BRAKE = ("the energy moves freely", "the energy is held back, as its walkers cannot follow: it is not done")


def of_history(history: dict[str, np.ndarray], diverged: bool) -> list[Check]:
    """Checks of what the steps reported, over the last tenth of them."""
    faulty = sum(int((~np.isfinite(v)).sum()) for k, v in history.items() if not k.endswith("/log_z")) + diverged
    verdicts = ("every step was finite", "the fit diverged and holds its last sound state")
    checks = [at_most("non-finite steps", faulty, 0, verdicts, "a lower learning rate, or the default chains")]
    tail = {name: float(np.mean(v[-max(1, len(v) // 10) :])) for name, v in history.items() if len(v)}
    for name, value in tail.items():
        site, _, what = name.rpartition("/")
        if site and what in OF_WALKERS:
            title, check, *rest = OF_WALKERS[what]
            checks.append(check(f"{site}: {title}", abs(value), *rest))
        elif not site and what in OF_WEIGHTS:
            title, check, *rest = OF_WEIGHTS[what]
            checks.append(check(title, value, *rest))
    if "brake" in tail:
        checks.append(at_least("brake", tail["brake"], 0.5, BRAKE, MORE_STEPS))
    return checks


def of_draws(draws: Draws, kernel: AbstractKernel, latents: Collection[str]) -> list[Check]:
    """Checks of the collected draws: finite, mixed, all of them moving, accepted at a sound rate."""
    bad = sum(int((~np.isfinite(x)).sum()) for x in [*draws.samples.values(), draws.log_density])
    verdicts = ("every draw is finite", "the model's densities overflow at the fitted parameters")
    checks = [at_most("non-finite draws", bad, 0, verdicts, "looking at fit.draws.log_density")]
    samples = {} if bad else {name: draws.samples[name] for name in latents if name in draws.samples}
    for name, values in samples.items():
        if values.shape[1] < 4:
            continue
        flat = values.reshape((*values.shape[:2], -1))
        some = flat[..., spaced(flat.shape[-1], MAX_DIAGNOSED)].astype(np.float64)
        some = some[..., np.ptp(some, axis=(0, 1)) > 0]
        verdicts = ("the particles agree", "the particles disagree")
        remedy = "larger warmup, thinning or num_samples; where posteriors have several modes, EBIPLA.infer"
        with np.errstate(divide="ignore", invalid="ignore"):
            r_hat = np.max(split_gelman_rubin(some), initial=1.0)
            n_eff = np.min(effective_sample_size(some), initial=np.inf)
        checks.append(at_most(f"{name}: R-hat", r_hat, 1.1, verdicts, remedy))
        verdicts = ("enough for means and sds", "too few for a posterior mean")
        checks.append(at_least(f"{name}: ESS", n_eff, 50, verdicts, remedy))
        verdicts = ("every particle moves", "as many scalars of particles never changed")
        checks.append(at_most(f"{name}: frozen", _frozen(flat), 0, verdicts, "more num_steps, or larger warmup"))
        verdicts = ("values are told apart", "this precision cannot tell values apart where particles lie: a bias")
        remedy = "double precision (numpyro.enable_x64() and float64 data), or other units of this latent"
        checks.append(at_most(f"{name}: ties", _ties(some), MOST_TIES, verdicts, remedy))
    if isinstance(kernel, MALA):
        verdicts = ("moves are taken", "moves are refused: the particles stand still")
        for block, values in draws.accept.items():
            name = block.replace("accept_", "acceptance, ")
            checks.append(at_least(name, values.mean(), 0.3, verdicts, "warmup=500"))
    return checks


def _frozen(draws: np.ndarray) -> int:
    """Chains ``[particle, draw, scalar]`` that never moved, but for scalars that are the same in all particles.

    Those are constants by construction, as the first element of a Cholesky factor of correlations is.
    """
    if draws.shape[1] < FROZEN_DRAWS:
        return 0
    chains = (draws == draws[:, :1]).all(1)
    if len(draws) > 1:
        chains = chains & ~(chains.all(0) & (draws[:, 0] == draws[:1, 0]).all(0))
    return int(chains.sum())


def _ties(draws: np.ndarray) -> float:
    """Share of the draws ``[particle, draw, scalar]`` at which another particle has the very same value.

    Close to the edge of a support single precision has few values left: there are none between 1 − 6e-8 and 1.
    """
    if len(draws) < 2 or not draws.size:
        return 0.0
    ordered = np.sort(draws, axis=0)
    return float((ordered[1:] == ordered[:-1]).mean())
