"""What a run leaves: plain data, and what follows from it without ArviZ or a verdict."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_ebipla._core.state import Params, TrainState
from numpyro_ebipla._core.static import is_traced, split_static
from numpyro_ebipla._core.validate import check_key
from numpyro_ebipla.likelihood.weighted import weighted_log_marginal
from numpyro_ebipla.model.blocks import BY_BLOCK, Batch
from numpyro_ebipla.model.energy import EnergyPrior
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.model.values import SiteLayout
from numpyro_ebipla.smc.normaliser import Estimate
from numpyro_ebipla.training.collect import Draws, Plan
from numpyro_ebipla.training.config import Config
from numpyro_ebipla.training.newton import ARRIVED
from numpyro_ebipla.walkers.base import AbstractWalkers

#: Tags by which keys are derived from the state's own, so that no two uses share one.
KEY_NORMALIZER, KEY_WALKERS = 0x10C2, 0x5EED


class Replayed(NamedTuple):
    """Prior walkers at the fitted parameters.

    Attributes:
        position: ``{site: [P, ...]}``, constrained and equally weighted.
        log_z: ``{site: log Z}`` where the strategy knows one, for the first block of data.
    """

    position: dict[str, np.ndarray]
    log_z: dict[str, float]


@dataclass(frozen=True, eq=False, repr=False)
class Fitted:
    """The record of a run; see :class:`.Fit`, which adds what people look at.

    Attributes:
        params: constrained parameters, like SVI's, with those that were held.
        state: the last sound :class:`.TrainState`; ``run(init_state=fit.state)`` goes on.
        history: ``{name: [K]}`` contrast, gradient norm, acceptance, step sizes; for each energy prior
            ``site/accept``, ``site/log_z`` and, by strategy, ``site/ess`` (over P), ``site/swap``; and
            ``params`` ``[K, L]``, the unconstrained parameters as one vector, if they are up to 32.
        stopped: why the run ended early, or None.
        model: the model with the fitted parameters put in. It visits the data that :meth:`get_samples` holds,
            not a random minibatch (all data of plates of another size).
        args: of the model, as in ``run``.
        kwargs: likewise.
        draws: ``samples``, ``log_density`` and ``accept``, see :class:`.Draws`; None if the model has no latents.
        plan: what was collected: ``num_samples``, ``thinning``, ``warmup``, ``sites``, ``indices``.
        layout: ``{site: SiteLayout}`` of what was collected.
        config: the choices that the run was composed of, see :class:`.Config`.
    """

    params: Params
    state: TrainState
    history: dict[str, np.ndarray]
    stopped: str | None
    model: Callable
    args: tuple
    kwargs: dict[str, Any]
    draws: Draws | None
    plan: Plan
    layout: dict[str, SiteLayout]
    config: Config

    @property
    def arrived(self) -> bool:
        """Whether the run ended because going on would have gained nothing, see :mod:`.training.newton`."""
        return (self.stopped or "").startswith(ARRIVED)

    @property
    def losses(self) -> np.ndarray:
        """Contrast at each step, ``[K]``, as SVI calls it. Its level means nothing without ``log_z``."""
        return self.history["contrast"]

    @property
    def trained_params(self) -> Params:
        """Those of ``params`` that were not held."""
        return {name: value for name, value in self.params.items() if name not in self.config.model.held}

    @property
    def num_chains(self) -> int:
        """N, the particles."""
        return self.config.num_particles

    @property
    def num_samples(self) -> int:
        """S, the draws of each particle."""
        return self.plan.num_samples if self.draws is not None else 1

    @property
    def plate_name(self) -> str | None:
        """The data plate's name."""
        plate = self.config.model.plate
        return plate.name if plate else None

    @property
    def collected(self) -> np.ndarray:
        """Indices of the data whose latents were collected."""
        return np.arange(self.config.model.num_data) if self.plan.indices is None else np.asarray(self.plan.indices)

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines on what may surprise: why a latent in a plate is global, and what was not collected."""
        left = (f"{name}: not collected, as the draws would exceed max_bytes" for name in self.plan.left_out)
        return (*self.config.model.notes, *left)

    def get_samples(self, group_by_chain: bool = True) -> dict[str, np.ndarray]:
        """Return draws of the particles, constrained.

        Args:
            group_by_chain: ``[particle, draw, ...]`` if true, else ``[particle · draw, ...]``, as
                ``Predictive(fit.model, posterior_samples=…)`` wants it.
        """
        samples = self.draws.samples if self.draws is not None else {}
        if group_by_chain:
            return dict(samples)
        return {k: v.reshape((-1, *v.shape[2:])) for k, v in samples.items()}

    # --- energy priors --------------------------------------------------------------------------------

    def energy_prior(self, site: str | None = None) -> EnergyPrior:
        """Return the fitted prior as a NumPyro distribution, to sample from or evaluate.

        Args:
            site: which, if there are several. A prior that is conditional on covariates has the batch shape
                of the first minibatch.

        Raises:
            ValueError: if there is no such prior, or several and ``site`` is None.
        """
        name = self.energy_site(site)
        model = self.config.model
        return model.energy_priors(self.params, self.batch(model.blocks(joint=False)[0], random.key(0)))[name]

    def log_normalizer(self, site: str | None = None, rng_key: Array | None = None) -> Estimate:
        """Estimate log Z of the fitted energy prior, with its standard error, by :meth:`.EnergyPrior.log_normalizer`.

        Args:
            site: which, if there are several energy priors.
            rng_key: by default derived from the state's own.
        """
        return self.energy_prior(site).log_normalizer(self.key(KEY_NORMALIZER, rng_key))

    def log_marginal_likelihood(self, rng_key: Array | None = None) -> Estimate:
        """Estimate the log marginal likelihood of all data at the fitted parameters by weighted particles.

        JALA-EM (2505.18427, Prop. 1): the mean weight of the particles, for each datum of its own or, with global
        latents, of all data together. The error sums up the resamplings' variances as if the particles had forgotten
        each one before the next; energy priors add the annealed error of their log Z. Weight that was lost while the
        parameters had far to go is not in the error: :meth:`.Fit.diagnostics` compares with fresh populations.

        Args:
            rng_key: for log Z of energy priors; by default derived from the state's own.

        Returns:
            ``(value, std_error)`` in nats, scalars.

        Raises:
            ValueError: if the particles have no weights, the fit diverged, or an energy prior is conditional on
                covariates (for which :meth:`.EBIPLA.log_likelihood` anneals).

        >>> import numpyro, numpyro.distributions as dist
        >>> from numpyro_ebipla import EBIPLA, WeightedParticles
        >>> def model(y):
        ...     with numpyro.plate("data", len(y)):
        ...         x = numpyro.sample("x", dist.Normal(0, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> y = jnp.array([0.5, -1.0])
        >>> ebipla = EBIPLA(model, num_particles=100, num_steps=100, posterior=WeightedParticles())
        >>> value, error = ebipla.run(random.key(0), y, progress_bar=False).log_marginal_likelihood()
        >>> bool(abs(value - dist.Normal(0, 2**0.5).log_prob(y).sum()) < 5 * error)
        True
        """
        model = self.config.model
        if not self.config.particles.weighted:
            raise ValueError(
                "the particles of this fit carry no weights: fit with posterior=WeightedParticles(), or "
                "recipes.jala_em(model)."
            )
        conditional = [name for name, site in model.energies.items() if site.per_datum]
        if conditional:
            raise ValueError(
                f"the energy prior at '{conditional[0]}' has a normaliser for each datum: use "
                "EBIPLA.log_likelihood(rng_key, fit.params, …), which anneals them."
            )
        log_z = {name: self.log_normalizer(name, rng_key) for name in model.energies}
        batch = self.batch(None, self.state.rng_key)
        found = weighted_log_marginal(model, self.params, self.state.posterior, batch, log_z)
        if not is_traced(found) and not np.isfinite(found.value):  # inside jit there are no numbers to look at
            raise ValueError(f"the weights are not finite, so they say nothing of the likelihood: {self.stopped}.")
        return found

    def prior_samples(self, rng_key: Array | None = None, indices: Any = None) -> dict[str, np.ndarray]:
        """Return the prior walkers of every energy prior, ``{site: [P, ...]}``, constrained and equally weighted.

        They go on from the fit's last state by their own strategy (a fresh population, if that is what
        the strategy makes) for 50 rounds at the *fitted* parameters, which may be averages over many steps
        and so differ from those that the walkers last saw. Weighted walkers are resampled.

        Args:
            rng_key: by default derived from the state's own, so that the same fit gives the same walkers.
            indices: data for priors that are conditional on covariates (``[P, len(indices), ...]``), by
                default all.
        """
        return self.replay_walkers(rng_key, indices).position

    def replay_walkers(self, rng_key: Array | None = None, indices: Any = None) -> Replayed:
        """Return what :meth:`prior_samples` returns, and the log Z that the walkers know of."""
        model = self.config.model
        if not model.energies:
            return Replayed({}, {})
        wanted = np.arange(model.num_data) if indices is None else np.atleast_1d(indices)
        conditional = {name: site.per_datum for name, site in model.energies.items()}
        shown = wanted if any(conditional.values()) else wanted[:1]
        shown = np.resize(shown, max(len(shown), model.batch_size))  # walkers have the shape of a whole batch
        replay = model.compiled(_replay, tuple(self.config.walkers.items()))
        last = model.all_params(self.state.params)
        axes = {name: site.axis for name, site in model.energies.items()}
        found, log_z = model.map_blocks(
            lambda batch: replay(batch, self.params, last, self.state.prior),
            self.batch(None, self.key(KEY_WALKERS, rng_key)),
            (axes, BY_BLOCK),
            shown,
            joint=False,
        )
        position = {name: np.asarray(value) for name, value in found.items()}
        for name, axis in axes.items():
            if axis is not None:
                position[name] = np.take(position[name], np.arange(len(wanted)), axis)
        return Replayed(position, {name: float(value[0]) for name, value in log_z.items()})

    # --- parts ----------------------------------------------------------------------------------------

    def key(self, tag: int, rng_key: Any) -> Array:
        """Return ``rng_key``, checked, or else one derived from the state's own by a tag."""
        return random.fold_in(self.state.rng_key, tag) if rng_key is None else check_key(rng_key)

    def batch(self, indices: Array | None, rng_key: Array) -> Batch:
        """Return what the model sees of these data."""
        data = jax.tree.map(jnp.asarray, split_static((self.args, self.kwargs))[0])
        return Batch(indices, data, rng_key, self.state.mutable)

    def energy_site(self, site: str | None) -> str:
        """Return the name of the energy prior that is meant.

        Raises:
            ValueError: if there is none, or it is not clear which.
        """
        names = list(self.config.model.energies)
        if not names:
            raise ValueError("the model has no energy prior, so there is none to evaluate, normalise or plot.")
        if site is None and len(names) == 1:
            return names[0]
        if site not in names:
            raise ValueError(f"site must be one of the model's energy priors {names}, got {site!r}.")
        return site


def _replay(
    model: LatentModel,
    strategies: tuple[tuple[str, AbstractWalkers], ...],
    batch: Batch,
    params: Params,
    last: Params,
    walkers: dict[str, Any],
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Bring walkers from the last parameters to the fitted ones: positions, constrained, and the log Z they know."""
    priors, before = model.energy_priors(params, batch), model.tilted(last, batch)
    out, log_z = {}, {}
    for i, (name, strategy) in enumerate(strategies):
        at = (before[name], priors[name].tilted())
        walked, said = strategy.replay(random.fold_in(batch.rng_key, i), *at, walkers[name])
        out[name] = priors[name].constrain_walkers(walked)
        if "log_z" in said:
            log_z[name] = said["log_z"]
    return out, log_z
