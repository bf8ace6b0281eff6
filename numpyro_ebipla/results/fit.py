"""What a run returns: plain data, and views of it for ArviZ and the terminal."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_ebipla._core.state import Params, TrainState, WalkerState
from numpyro_ebipla._core.static import split_static
from numpyro_ebipla._core.validate import check_key
from numpyro_ebipla.diagnostics.checks import Diagnostics
from numpyro_ebipla.diagnostics.report import of_fit
from numpyro_ebipla.likelihood.weighted import weighted_log_marginal
from numpyro_ebipla.model.energy import EnergyPrior
from numpyro_ebipla.model.latent_model import Batch, LatentModel
from numpyro_ebipla.results import arviz
from numpyro_ebipla.results.summary import summary_lines
from numpyro_ebipla.results.visiting import on_collected
from numpyro_ebipla.smc.normaliser import Estimate
from numpyro_ebipla.training.collect import Draws, Layout, Plan
from numpyro_ebipla.training.config import Config
from numpyro_ebipla.walkers.base import WalkerStrategy


@dataclass(frozen=True, eq=False, repr=False)
class Fit:
    """A fitted model: arrays, and the functions that were fitted.

    ``az.from_numpyro(fit)`` works as for an ``MCMC`` object; :meth:`to_arviz` gives more groups.

    Attributes:
        params: constrained parameters, like SVI's.
        state: the last sound :class:`~numpyro_ebipla._core.state.TrainState`; ``run(init_state=fit.state)`` goes
            on.
        history: ``{name: [K]}`` contrast, gradient norm, acceptance, step sizes; for each energy prior
            ``site/accept``, ``site/log_z`` and, by strategy, ``site/ess`` (as a fraction), ``site/swap``.
        stopped: why the run ended early, or None.
        model: the model with the fitted parameters put in. It visits the data that :meth:`get_samples` holds,
            not a random minibatch (all data of plates of another size).
        args, kwargs: of the model, as in ``run``.
        draws: ``samples``, ``log_density`` and ``accept``, see :class:`~numpyro_ebipla.training.collect.Draws`; None
            if the model has no latents.
        plan: what was collected: ``num_samples``, ``thinning``, ``warmup``, ``sites``, ``indices``.
        layout: ``{site: Layout}`` of what was collected.
        config: the choices that the run was composed of, see :class:`~numpyro_ebipla.training.config.Config`.

    >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
    >>> from numpyro_ebipla import EBIPLA
    >>> def model(y):
    ...     mean = numpyro.param("mean", 0.0)
    ...     with numpyro.plate("data", len(y)):
    ...         x = numpyro.sample("x", dist.Normal(mean, 1))
    ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
    >>> ebipla = EBIPLA(model, num_particles=4, num_steps=10, num_samples=20)
    >>> fit = ebipla.run(random.key(0), jnp.arange(3.0), progress_bar=False)
    >>> fit
    Fit(10 steps, 4 particles, 20 draws each of 'x')
    >>> fit.get_samples()["x"].shape, fit.losses.shape
    ((4, 20, 3), (10,))
    >>> fit.to_arviz().posterior["x"].dims
    ('chain', 'draw', 'data')
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
    layout: dict[str, Layout]
    config: Config

    @staticmethod
    def build(**fields: Any) -> "Fit":
        """What :meth:`EBIPLA.run` has, with the parameters put into the model."""
        return on_collected(Fit(**fields))

    @property
    def losses(self) -> np.ndarray:
        """Contrast at each step, ``[K]``, as SVI calls it. Its level means nothing without ``log_z``."""
        return self.history["contrast"]

    @property
    def num_chains(self) -> int:
        """N, the particles."""
        return self.config.num_particles

    @property
    def num_samples(self) -> int:
        """S, the draws of each particle."""
        return self.plan.num_samples if self.draws is not None else 1

    # --- samples --------------------------------------------------------------------------------------

    def get_samples(self, group_by_chain: bool = True) -> dict[str, np.ndarray]:
        """Draws of the particles, constrained.

        Args:
            group_by_chain: ``[particle, draw, ...]`` if true, else ``[particle · draw, ...]``, as
                ``Predictive(fit.model, posterior_samples=…)`` wants it.
        """
        samples = self.draws.samples if self.draws is not None else {}
        if group_by_chain:
            return dict(samples)
        return {k: v.reshape((-1, *v.shape[2:])) for k, v in samples.items()}

    def energy_prior(self, site: str | None = None) -> EnergyPrior:
        """The fitted prior as a NumPyro distribution, to sample from or evaluate.

        Args:
            site: which, if there are several. A prior that is conditional on covariates has the batch shape
                of the first minibatch.

        Raises:
            ValueError: if there is no such prior, or several and ``site`` is None.
        """
        name = self._energy_site(site)
        model = self.config.model
        return model.energy_priors(self.params, self._batch(model.blocks(joint=False)[0], random.key(0)))[name]

    def log_normalizer(self, site: str | None = None, rng_key: Array | None = None) -> tuple[Array, Array]:
        """Log Z of the fitted energy prior and its standard error, by fine annealing.

        Args:
            site: which, if there are several energy priors.
            rng_key: by default derived from the state's own.
        """
        key = self._key(0x10C2, rng_key)
        return self.energy_prior(site).log_normalizer(key)

    def log_marginal_likelihood(self, rng_key: Array | None = None) -> Estimate:
        """Log marginal likelihood of all data at the fitted parameters, ``(value, std_error)``, by weighted particles.

        JALA-EM (2505.18427, Prop. 1): the mean weight of the particles, for each datum of its own or, with global
        latents, of all data together. The error sums up the resamplings' variances as if the particles had forgotten
        each one before the next; energy priors add the annealed error of their log Z. Weight that was lost while the
        parameters had far to go is not in the error: :meth:`diagnostics` compares with populations annealed afresh.

        Args:
            rng_key: for log Z of energy priors; by default derived from the state's own.

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
        log_z = {name: Estimate(*self.log_normalizer(name, rng_key)) for name in model.energies}
        batch = self._batch(None, self.state.rng_key)
        found = weighted_log_marginal(model, self.params, self.state.posterior, batch, log_z)
        # Inside jit there are no numbers to look at.
        if not isinstance(found.value, jax.core.Tracer) and not np.isfinite(found.value):
            raise ValueError(f"the weights are not finite, so they say nothing of the likelihood: {self.stopped}.")
        return found

    def prior_samples(self, rng_key: Array | None = None, indices: Any = None) -> dict[str, np.ndarray]:
        """The prior walkers of every energy prior, ``{site: [P, ...]}``, constrained and equally weighted.

        They go on from the fit's last state by their own strategy (a fresh population, if that is what
        the strategy makes) for 50 rounds at the *fitted* parameters, which may be averages over many steps
        and so differ from those that the walkers last saw. Weighted walkers are resampled.

        Args:
            rng_key: by default derived from the state's own, so that the same fit gives the same walkers.
            indices: data for priors that are conditional on covariates (``[P, len(indices), ...]``), by
                default all.
        """
        return self._walkers(rng_key, indices)[0]

    def _walkers(self, rng_key: Array | None, indices: Any) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """:meth:`prior_samples`, and the log Z that the walkers know of, at the first block of data."""
        key = self._key(0x5EED, rng_key)
        model = self.config.model
        if not model.energies:
            return {}, {}
        wanted = np.arange(model.num_data) if indices is None else np.atleast_1d(indices)
        how, last = tuple(self.config.walkers.items()), model.constrain_params(self.state.params)
        per_datum = any(site.per_datum for site in model.energies.values())
        shown = wanted if per_datum else wanted[:1]
        shown = np.resize(shown, max(len(shown), model.batch_size))  # walkers have the shape of a whole batch
        parts = []
        for i, block in enumerate(model.blocks(shown, joint=False)):
            batch = self._batch(block, random.fold_in(key, i))
            parts.append(jax.tree.map(np.asarray, _walked(model, how, batch, self.params, last, self.state.prior)))
        result = {}
        for name, site in model.energies.items():
            result[name] = parts[0][0][name]
            if site.per_datum:
                axis = model.plate.dim - self.energy_prior(name).event_dim
                joined = np.concatenate([part[0][name] for part in parts], axis)
                kept = np.arange(len(wanted)) if model.subsampled else wanted
                result[name] = np.take(joined, kept, axis)
        return result, {name: float(info["log_z"]) for name, info in parts[0][1].items() if "log_z" in info}

    # --- ArviZ ----------------------------------------------------------------------------------------

    def to_arviz(
        self,
        var_names: Sequence[str] | None = None,
        indices: Any = None,
        *,
        log_likelihood: bool = False,
        posterior_predictive: bool = False,
        prior: bool = True,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        rng_key: Array | None = None,
        max_bytes: int = 2 * 2**30,
    ) -> Any:
        """The fit as ArviZ has it: an ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x).

        ======================  =============================================================================
        group                   content
        ======================  =============================================================================
        posterior               the draws; chain = particle
        sample_stats            ``lp``, the log density of latents and data (by datum where their chains are
                                independent; an energy prior's −log Z is left out), and the acceptance of
                                each draw's last move, averaged over the particles
        prior                   the walkers of the energy priors, see :meth:`prior_samples`; other latents
                                have none
        observed_data           the observed sites, of the chosen data
        constant_data           the other array arguments of the model, whole
        log_likelihood          on request, of the observed sites (``factor`` left out); observed energy
                                priors are normalised by an annealed estimate of log Z
        posterior_predictive    on request, the observed sites redrawn for each draw
        ======================  =============================================================================

        Axes of plates are named by the plate; its coordinates are the indices of the data. Other axes are
        ``<site>_dim_<i>``, or as ``infer={"event_dims": […]}`` at the site says.

        Args:
            var_names: posterior sites to keep, by default all that the run collected.
            indices: data to keep, by default all that the run collected. ``az.summary`` takes a minute for
                10,000 scalars and plots fail: choose a few.
            log_likelihood: add the group of that name. PSIS-LOO on it misleads where each datum has latents
                of its own.
            posterior_predictive: likewise.
            prior: whether to add the prior walkers.
            coords: ``{dim: values}``; for the data plate, of all M data.
            dims: ``{variable: [dim, ...]}`` to name axes by hand, e.g. ``{"X": ["data", "feature"]}``.
                Constant data that so have the plate's dimension are cut to the chosen indices.
            rng_key: for the predictive draws and the walkers.
            max_bytes: refuse to make larger groups than this.

        Raises:
            ImportError: without ArviZ.
            ValueError: naming a variable or index that was not collected, or what would be too large.
        """
        return arviz.convert(
            self,
            var_names,
            indices,
            log_likelihood=log_likelihood,
            posterior_predictive=posterior_predictive,
            prior=prior,
            coords=dict(coords or {}),
            dims={k: list(v) for k, v in (dims or {}).items()},
            rng_key=rng_key,
            max_bytes=max_bytes,
        )

    # What ArviZ's own converters ask an inference object for. They know nothing of ``indices``: data that
    # were collected by themselves count from zero there.

    @property
    def sample_dims(self) -> list[str]:
        """For ``az.from_numpyro``."""
        return ["chain", "draw"]

    @property
    def sample_shape(self) -> tuple[int, int]:
        """For ``az.from_numpyro``."""
        return (self.num_chains, self.num_samples)

    @property
    def thinning(self) -> int:
        """For ``az.from_numpyro``, which divides ``num_samples`` by it: one. See ``fit.plan.thinning``."""
        return 1

    @property
    def sampler(self) -> Any:
        """For ``az.from_numpyro``."""
        return SimpleNamespace(model=self.model)

    @property
    def _args(self) -> tuple:
        return self.args

    @property
    def _kwargs(self) -> dict[str, Any]:
        return self.kwargs

    def get_sample_stats(self) -> dict[str, np.ndarray]:
        """``{"lp": [particle, draw, ...]}``."""
        return {} if self.draws is None else {"lp": np.asarray(self.draws.log_density)}

    def get_extra_fields(self, group_by_chain: bool = False) -> dict[str, np.ndarray]:
        """As of an ``MCMC`` object."""
        stats = self.get_sample_stats()
        return stats if group_by_chain else {k: v.reshape((-1, *v.shape[2:])) for k, v in stats.items()}

    # --- the terminal ---------------------------------------------------------------------------------

    def diagnostics(self, rng_key: Array | None = None) -> Diagnostics:
        """Whether the fit is to be trusted: checks with a threshold, a verdict and what to change.

        ==============================  ===================================================================
        check                           what it looks at
        ==============================  ===================================================================
        non-finite steps, draws         how many there were
        nats still gained               an upper bound of what the log likelihood has gained since the
                                        average over the last third of the steps, in nats per datum
        nats to gain                    what a Newton step along the way that the run was going would gain
        R-hat, ESS                      the worst of up to 1000 scalars of each collected site
        frozen                          scalars of particles that are the same in all draws
        ties                            share of draws that are equal to another particle's: values at an edge
                                        of the support that the precision cannot resolve
        acceptance                      of the last moves of the particles (MALA)
        walkers' acceptance, ESS, …     what the strategy reports, averaged over the last tenth of the steps
        energy gap                      between walkers and particles, over the last tenth; it is zero at the
                                        maximum
        log Z, std error                of populations annealed afresh, by their spread
        log Z, walkers − fresh          whether the walkers' log Z, if they know one, agrees with that
        MMD², walkers − fresh           whether the walkers are draws of the prior
        MMD², particles − fresh         whether the prior is where the posteriors of the data are
        ==============================  ===================================================================

        An energy prior takes some seconds, for its fresh draws. :mod:`numpyro_ebipla.diagnostics` has more.

        Args:
            rng_key: of the fresh draws, by default derived from the state's own.

        Returns:
            :class:`~numpyro_ebipla.diagnostics.checks.Diagnostics`: print it, or look at ``passed``, ``warnings`` and
            ``checks``.
        """
        key = self._key(0xD1A6, rng_key)
        return of_fit(self, key)

    def print_summary(
        self,
        var_names: Sequence[str] | None = None,
        indices: Any = None,
        *,
        prob: float = 0.9,
        max_rows: int = 10,
        diagnostics: bool = True,
    ) -> None:
        """Print the run, its parameters, NumPyro's diagnostics of the draws, and :meth:`diagnostics`.

        Of a site with more than ``max_rows`` scalars evenly spaced ones are shown, and a line says so and
        gives the worst R-hat and ESS of up to 1000.

        Args:
            var_names: sites, by default all that were collected.
            indices: data, by default all that were collected.
            prob: of the credible intervals.
            max_rows: rows for each site.
            diagnostics: whether to print these, too; with an energy prior they take some seconds.

        Raises:
            ValueError: naming a site or index that was not collected.
        """
        lines = summary_lines(self, var_names, indices, prob, max_rows)
        print("\n".join([*lines, "", str(self.diagnostics())] if diagnostics else lines))

    def __repr__(self) -> str:
        text = f"{int(self.state.step)} steps"
        if self.draws is not None:
            sites = ", ".join(repr(name) for name in self.draws.samples)
            text += f", {self.num_chains} particles, {self.num_samples} draws each of {sites}"
        return f"Fit({text}{', stopped early' if self.stopped else ''})"

    # --- parts ----------------------------------------------------------------------------------------

    def _key(self, number: int, rng_key: Any) -> Array:
        """``rng_key``, by default derived from the state's own."""
        return random.fold_in(self.state.rng_key, number) if rng_key is None else check_key(rng_key)

    def _batch(self, indices: Array | None, rng_key: Array) -> Batch:
        """What the model sees, of these data."""
        data = jax.tree.map(jnp.asarray, split_static((self.args, self.kwargs))[0])
        return Batch(indices, data, rng_key, self.state.mutable)

    def _energy_site(self, site: str | None) -> str:
        names = list(self.config.model.energies)
        if not names:
            raise ValueError("the model has no energy prior, so there is none to evaluate, normalise or plot.")
        if site is None and len(names) == 1:
            return names[0]
        if site not in names:
            raise ValueError(f"site must be one of the model's energy priors {names}, got {site!r}.")
        return site


@partial(jax.jit, static_argnums=(0, 1))
def _walked(
    model: LatentModel,
    strategies: tuple[tuple[str, WalkerStrategy], ...],
    batch: Batch,
    params: Params,
    last: Params,
    walkers: dict[str, WalkerState],
) -> tuple[dict[str, Array], dict[str, dict[str, Array]]]:
    """See :meth:`Fit.prior_samples`: the walkers, constrained, and what their strategies report."""
    priors, before = model.energy_priors(params, batch), model.tilted(last, batch)
    out, said = {}, {}
    for i, (name, strategy) in enumerate(strategies):
        at = (before[name], priors[name].tilted())
        walked, said[name] = strategy.replay(random.fold_in(batch.rng_key, i), *at, walkers[name])
        out[name] = priors[name].constrain_walkers(walked)
    return out, said
