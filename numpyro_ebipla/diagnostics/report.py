"""All checks of a fit, and a warning after a run whose cheap ones fail."""

import numpy as np
from jax import Array, random

from numpyro_ebipla._core.errors import ModelError, warn
from numpyro_ebipla._core.state import Latents
from numpyro_ebipla._core.tree import take
from numpyro_ebipla.diagnostics.checks import Check, Diagnostics, Rule
from numpyro_ebipla.diagnostics.parameters import check_parameters
from numpyro_ebipla.diagnostics.prior import FreshDraws, check_prior, draw_fresh
from numpyro_ebipla.diagnostics.run import check_draws, check_history
from numpyro_ebipla.diagnostics.weights import check_weights
from numpyro_ebipla.likelihood.annealed import log_likelihood
from numpyro_ebipla.likelihood.posterior import Populations
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.training.fitted import Fitted

#: A run of fewer steps or draws is not warned of, unless it ended because it had arrived.
JUDGED_STEPS, JUDGED_DRAWS = 1000, 100
#: Steps after which a generator may be dead for good.
STEPS_TO_DIE = 100

SOME_DRAWS = Rule(
    "draws",
    1,
    "there are some",
    "none were collected, so the particles and the parameters cannot be judged",
    "fit.collect()",
    is_least=True,
)
WEIGHTS = Rule(
    "log p(y), weights − fresh",
    1.0,
    "weights and fresh populations agree",
    "the weights have lost the marginal likelihood on the way",
    "run(init_params=fit.params), which anneals its particles there, or EBIPLA.log_likelihood",
)


def check_run(fit: Fitted) -> list[Check]:
    """Check what a fit can tell without further work."""
    checks = check_history(fit.history, "diverged" in (fit.stopped or ""))
    if fit.config.model.latents and fit.draws is None:
        checks.append(SOME_DRAWS.judge(0))
    if fit.draws is not None:
        checks += check_draws(fit.draws, fit.config.particles.kernel, fit.config.model.latents)
    return checks


def warn_of_run(fit: Fitted) -> None:
    """Warn if the checks that cost little say that a whole run went wrong; short ones are left alone."""
    key, checks = random.key(0), []
    if len(fit.losses) >= STEPS_TO_DIE:
        checks += _weights_alive(fit, _batch(fit, key))
    whole = len(fit.losses) >= JUDGED_STEPS or fit.arrived
    if whole and fit.num_samples >= JUDGED_DRAWS:
        checks += check_run(fit)
        if not fit.config.model.energies:
            checks += _parameters(fit, _batch(fit, key), {})
    found = Diagnostics(tuple(checks))
    if found.warnings:
        said = "\n".join(f"- {sentence}" for sentence in found.warnings)
        begin = "figures of the fit are slightly off" if found.slight else "the fit may be wrong"
        warn(f"{begin}, see fit.diagnostics():\n{said}")


def check_fit(fit: Fitted, rng_key: Array) -> Diagnostics:
    """Check a fit in every way."""
    model, draws, batch = fit.config.model, fit.draws, _batch(fit, rng_key)
    priors = model.energy_priors(fit.params, batch)
    new = {name: draw_fresh(prior, random.fold_in(rng_key, i)) for i, (name, prior) in enumerate(priors.items())}
    checks = [*check_run(fit), *_weights_alive(fit, batch), *_parameters(fit, batch, new), *_weights(fit, rng_key)]
    walkers = fit.replay_walkers(rng_key, fit.collected[:1])
    for name, prior in priors.items():
        if model.energies[name].per_datum:
            checks += check_prior(name, new[name])
            continue
        particles = None
        if model.energies[name].observed and not model.latents:
            particles = model.energy_positions(fit.params, {}, {}, batch)[name]
        elif draws is not None and name in draws.samples:
            particles = prior.as_walkers(draws.samples[name])
        at = prior.as_walkers(walkers.position[name])
        checks += check_prior(name, new[name], walkers.log_z.get(name), at, particles)
    return Diagnostics(tuple(checks))


def _parameters(fit: Fitted, batch: Batch, new: dict[str, FreshDraws]) -> list[Check]:
    if fit.config.model.latents and fit.draws is None:
        return []
    thetas = (fit.config.model.unconstrain_params(fit.trained_params), fit.state.slow_average)
    return check_parameters(fit.config.model, thetas, batch, new, fit.draws, fit.num_chains, fit.collected)


def _weights_alive(fit: Fitted, batch: Batch) -> list[Check]:
    posterior = fit.state.posterior
    latents = Latents(take(posterior.local, batch.indices, 1), posterior.shared)
    return check_weights(fit.config.model, fit.trained_params, latents, batch)


def _weights(fit: Fitted, rng_key: Array) -> list[Check]:
    """Check the marginal likelihood by weighted particles against fresh populations at the fitted parameters.

    Weight that was lost while the parameters had far to go does not come back, and no ESS remembers it.
    """
    model = fit.config.model
    if not fit.config.particles.weighted or any(site.per_datum for site in model.energies.values()):
        return []
    try:
        fresh = log_likelihood(model, fit.params, fit.batch(None, rng_key), Populations()).total
        own = fit.log_marginal_likelihood()
    except (ModelError, ValueError):  # an improper prior, a scaled site; a fit that diverged
        return []
    off = abs(float(own.value - fresh.value))
    slack = 3 * float(np.hypot(own.std_error, fresh.std_error))
    return [WEIGHTS.judge(off, slack=slack)]


def _batch(fit: Fitted, rng_key: Array) -> Batch:
    """Return a minibatch of the data collected."""
    return fit.batch(fit.config.model.blocks(fit.collected, joint=False)[0], rng_key)
