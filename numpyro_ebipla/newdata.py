"""What a fitted model says of data, the parameters held: the methods of :class:`.EBIPLA` beside ``run``."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Params
from numpyro_ebipla._core.static import is_traced
from numpyro_ebipla._core.validate import (
    accepts,
    as_count,
    as_site_names,
    check_options,
    check_spelling,
    check_untraced,
)
from numpyro_ebipla.likelihood.annealed import TOO_SHORT, LogLikelihood, check_proper, is_joint, log_likelihood
from numpyro_ebipla.likelihood.bidirectional import Bounds, bidirectional
from numpyro_ebipla.likelihood.posterior import (
    Populations,
    anneal_posterior,
    check_finite,
    draw_posterior,
    warn_of_short_ladders,
)
from numpyro_ebipla.likelihood.reconstruct import reconstruct
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.results.build import Collection
from numpyro_ebipla.results.drawing import progress_of
from numpyro_ebipla.results.fit import Fit
from numpyro_ebipla.smc.annealing import Annealing
from numpyro_ebipla.system import Systems
from numpyro_ebipla.training.collect import Plan
from numpyro_ebipla.training.starting import Start

#: Least size of the population from which the particles of new data are taken.
POPULATION = 256
#: For bounds, which have no resampling to mend what a stage costs: smaller stages, and more of them.
FOR_BOUNDS = Annealing(stage_ess=0.98, max_temps=500)
#: Arguments of these methods that say how populations are annealed.
OPTIONS = ("num_particles", "num_populations", "annealing")


class NewData:
    """Methods for data that were not fitted, at parameters that are held."""

    model: Callable
    num_samples: int
    thinning: int
    warmup: int
    guide: Callable | None
    guide_params: Params
    _systems: Systems

    def infer(
        self,
        rng_key: Array,
        params: Params,
        *args: Any,
        num_samples: int | None = None,
        thinning: int | None = None,
        warmup: int | None = None,
        progress_bar: bool = False,
        sites: Sequence[str] | None = None,
        indices: Any = None,
        max_bytes: int = 2 * 2**30,
        annealing: Annealing = Annealing(),
        **kwargs: Any,
    ) -> Fit:
        """Return posterior particles for data never seen, the parameters held.

        Particles are annealed from the prior to each datum's posterior, so that all its modes have their masses; or, by
        the constructor's ``guide``, begin at its draws, which is faster and leaves modes with its masses. Then they are
        moved and collected as :meth:`.EBIPLA.run` does after its steps: ``warmup`` moves in which the kernel adapts,
        then ``num_samples`` draws of each.

        Args:
            rng_key: PRNG key.
            params: constrained parameters, such as ``fit.params``; with ``fit.state.mutable`` merged in, if the model
                has mutable state.
            *args: of the model, with another number of data if you like.
            num_samples: draws of each particle, by default the constructor's; 0 for none, as before
                :meth:`.Fit.posterior_mean`.
            thinning: moves between two draws, likewise.
            warmup: moves before the first draw, likewise.
            progress_bar: whether tqdm shows the collecting.
            sites: see :meth:`.EBIPLA.run`.
            indices: see :meth:`.EBIPLA.run`.
            max_bytes: see :meth:`.EBIPLA.run`.
            annealing: to the posteriors; where its temperatures were too few, a warning names the data.
            **kwargs: of the model.

        Returns:
            A :class:`.Fit` with an empty history. The walkers in its state stand at the base.

        Raises:
            ModelError: naming the site or parameter; for improper priors, and models without latents.

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_ebipla import EBIPLA
        >>> def model(y):
        ...     mean = numpyro.param("mean", 0.0)
        ...     with numpyro.plate("data", len(y)):
        ...         x = numpyro.sample("x", dist.Normal(mean, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> new = EBIPLA(model, num_particles=50).infer(random.key(0), {"mean": jnp.array(1.0)}, jnp.array([3.0, -1.0]))
        >>> x = new.get_samples()["x"]  # N((1 + y)/2, 1/2)
        >>> x.shape, bool(abs(x.mean((0, 1)) - jnp.array([2.0, 0.0])).max() < 0.1)
        ((50, 200, 2), True)
        """
        check_untraced("infer", rng_key, params, args, kwargs)
        counts = self._counts(num_samples, thinning, warmup)
        given: dict[str, Any] = {"num_samples": num_samples, "thinning": thinning, "warmup": warmup}
        given |= {"sites": sites, "indices": indices, "max_bytes": max_bytes}
        check_options(self.model, self.infer, given)
        populations = self._populations(self.infer, kwargs, POPULATION, 1, annealing)
        held = self._systems.hold(rng_key, params, args, kwargs)
        system, model, batch = held.system, held.model, held.batch
        key_state, key_anneal, key_run = random.split(batch.rng_key, 3)
        if not model.latents:
            raise ModelError("infer: the model has no latent site, so there is no posterior.")
        if self.guide is None:
            check_proper(model, held.params, batch._replace(indices=model.blocks()[0]), scaled=True)
        plan = Plan(*counts, (), None, max_bytes)
        collection = Collection(system, plan, sites, indices, batch.data)
        begin = (key_state, model.unconstrain_params(held.params), batch.mutable, batch.data)
        state = system.begin(*begin, self._start(None))
        if self.guide is None and not system.config.particles.weighted:  # which have been annealed already
            anneal = model.compiled(_anneal_block, system.config.num_particles, populations)
            by_datum = None if model.global_sites else 0
            axes = ((None if model.global_sites else 1, None), by_datum)
            at = batch._replace(rng_key=key_anneal)
            (local, shared), left = model.map_blocks(lambda here: anneal(held.params, here), at, axes)
            local, shared = jax.tree.map(jnp.asarray, (local, shared))
            state = state._replace(posterior=state.posterior._replace(local=local, shared=shared))
            warn_of_short_ladders("infer", left < TOO_SHORT, annealing, "their particles may not have arrived")
        key_draws, record = random.fold_in(key_run, 1), (state, {"contrast": np.zeros(0)}, None, progress_bar)
        return collection.finish(key_draws, *record, self.model, args, held.call.kwargs)

    def log_likelihood(
        self,
        rng_key: Array,
        params: Params,
        *args: Any,
        num_particles: int = 128,
        num_populations: int = 4,
        annealing: Annealing = Annealing(),
        **kwargs: Any,
    ) -> LogLikelihood:
        r"""Estimate ``log p_θ(y)`` of every datum, latents integrated out, energies normalised.

        By populations annealed from the prior to each posterior (sequential Monte Carlo; Neal, 2001), and for energy
        priors by ``log Z`` from populations annealed as the prior's own options say. Errors are sums of ``1/ESS − 1/N``
        over the resamplings, or the populations' spread where that contradicts them. Global latents couple all data:
        then it is one number for all. A model without latents is evaluated, not annealed.

        Args:
            rng_key: PRNG key.
            params: see :meth:`infer`.
            *args: of the model; ``batch_size`` of a subsampled plate is the number of data worked off at a time, so it
                bounds the memory and changes nothing else.
            num_particles: of a population, for each datum.
            num_populations: independent ones.
            annealing: to the posteriors.
            **kwargs: of the model.

        Returns:
            A :class:`.LogLikelihood`: ``value``, ``std_error``, ``ess`` of shape ``[M]``, …

        Raises:
            ModelError: naming the site; for improper priors and scaled sites.

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_ebipla import EBIPLA
        >>> def model(y):
        ...     with numpyro.plate("data", len(y)):
        ...         x = numpyro.sample("x", dist.Normal(0, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> y = jnp.array([0.5, -1.0])
        >>> value, std_error, *_ = EBIPLA(model).log_likelihood(random.key(0), {}, y)
        >>> exact = dist.Normal(0, 2**0.5).log_prob(y)
        >>> bool((abs(value - exact) < 4 * std_error).all())
        True
        """
        populations = self._populations(self.log_likelihood, kwargs, num_particles, num_populations, annealing)
        held = self._systems.hold(rng_key, params, args, kwargs)
        found = log_likelihood(held.model, held.params, held.batch, populations)
        if is_traced(found.value):  # inside jit or vmap there are no numbers to look at
            return found
        check_finite("log_likelihood", found.value)
        warn_of_short_ladders("log_likelihood", np.isinf(found.std_error), annealing, "std_error is infinite there")
        return found

    def anomaly_score(self, rng_key: Array, params: Params, *args: Any, **kwargs: Any) -> Array:
        """Return how surprising each datum is: ``−log p_θ(y)`` in nats, ``[M]``, by :meth:`log_likelihood`.

        Densities of continuous data have units, so only scores of the same model's data compare. In high dimension an
        outlier may well have a high density (Nalisnick et al., 2019).

        Args:
            rng_key: PRNG key.
            params: see :meth:`infer`.
            *args: of the model.
            **kwargs: of the model and of :meth:`log_likelihood`.

        Raises:
            ModelError: if global latents couple the data, so that none has a score of its own.
        """
        own = {name: value for name, value in kwargs.items() if name not in OPTIONS}
        check_spelling(self.model, self.log_likelihood, own, "anomaly_score")
        if is_joint(self._systems.hold(rng_key, params, args, own).model):
            raise ModelError(
                "anomaly_score: global latents couple the data, or there is no data plate, so no datum has a density "
                "of its own: log_likelihood gives that of all."
            )
        return -self.log_likelihood(rng_key, params, *args, **kwargs).value

    def reconstruct(
        self,
        rng_key: Array,
        params: Params,
        *args: Any,
        num_draws: int | None = None,
        sites: Sequence[str] | None = None,
        num_particles: int | None = None,
        annealing: Annealing | None = None,
        progress_bar: bool = False,
        **kwargs: Any,
    ) -> dict[str, np.ndarray]:
        """Return what the model expects at its observed sites, having seen the data: ``E[mean of p(y | x) | y]``.

        A reconstruction of the data, and of missing values an imputation: wrap the model in
        :class:`.nan_masked` and leave NaN in the data, or use ``obs_mask``.

        By default the expectation is over two chains of each datum, which take 200 gradients: they begin at the best of
        some draws from the prior, or at draws of the constructor's ``guide``. Posteriors of several modes, and means
        within a tenth of a posterior's width, want ``annealing=Annealing()``: a population annealed to each posterior,
        at some hundred times the cost. It serves global latents and ``num_draws`` in any case.

        Args:
            rng_key: PRNG key.
            params: see :meth:`infer`.
            *args: of the model.
            num_draws: instead of posterior means, this many equally weighted posterior draws of the distribution's mean
                (not of new data: noise of the observation is not in them).
            sites: observed sites, by default all.
            num_particles: of a population, for each datum; 256 if ``annealing`` is given.
            annealing: to the posteriors; :class:`.Annealing` if ``num_particles`` is given.
            progress_bar: whether tqdm shows how many blocks of data are done.
            **kwargs: of the model.

        Returns:
            ``{site: array}`` in the site's shape over all M data, or ``[num_draws, …]``.

        Raises:
            ModelError: naming a site whose distribution has no mean; for improper priors.
        """
        check_options(self.model, self.reconstruct, {"num_draws": num_draws, "sites": sites})
        many = num_draws is not None or num_particles is not None or annealing is not None
        populations = self._populations(self.reconstruct, kwargs, num_particles, 1, annealing)
        num_draws = None if num_draws is None else as_count("num_draws", num_draws)
        held = self._systems.hold(rng_key, params, args, kwargs)
        chosen = None if sites is None else as_site_names("sites", sites)
        how = (num_draws, chosen, populations if many else None, self.guide, self.guide_params)
        with progress_of("reconstruct", progress_bar) as progress:
            found, left = reconstruct(held.model, held.params, held.batch, *how, progress)
        warn_of_short_ladders(
            "reconstruct", left < TOO_SHORT, populations.annealing, "what is said of them may be far off"
        )
        for name, value in found.items():
            if not is_traced(value) and not np.isfinite(value).all():
                raise ModelError(
                    f"reconstruct: the mean at '{name}' is not finite: the data are too large for the arithmetic, or "
                    "lie where the model gives them no density."
                )
        return {name: value if is_traced(value) else np.asarray(value) for name, value in found.items()}

    def bidirectional(
        self,
        rng_key: Array,
        params: Params,
        *args: Any,
        annealing: Annealing = FOR_BOUNDS,
        num_particles: int = 64,
        num_populations: int = 4,
        **kwargs: Any,
    ) -> Bounds:
        """Return lower and upper bounds, on average, of ``log p_θ(y)`` for data *simulated* from the model.

        Bidirectional Monte Carlo (Grosse et al., 2015, 2016): the mean gap bounds the error of annealing at these
        settings, without resampling, and so says whether :meth:`log_likelihood` of data like the model's own can be
        relied upon. With an energy prior the latents are draws of an annealed population, see
        :meth:`.EnergyPrior.sample`, and both bounds share the estimate of log Z: its error is not in the gap.

        Args:
            rng_key: PRNG key.
            params: see :meth:`infer`.
            *args: of the model: as many data are simulated, with these covariates; the observed values do not matter.
            num_particles: chains in each direction, for each datum.
            num_populations: for log Z of energy priors.
            annealing: its temperatures and moves.
            **kwargs: of the model.

        Returns:
            :class:`.Bounds`: ``lower`` and ``upper`` of shape ``[M]``, and their ``gap``.

        Raises:
            ModelError: naming a site that cannot be simulated; for improper priors and scaled sites.

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_ebipla import EBIPLA
        >>> def model(y):
        ...     with numpyro.plate("data", len(y)):
        ...         x = numpyro.sample("x", dist.Normal(0, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> bounds = EBIPLA(model).bidirectional(random.key(0), {}, jnp.zeros(20))
        >>> bool(abs(bounds.gap.mean()) < 0.05)
        True
        """
        check_untraced("bidirectional", rng_key, params, args, kwargs)
        populations = self._populations(self.bidirectional, kwargs, num_particles, num_populations, annealing)
        held = self._systems.hold(rng_key, params, args, kwargs)
        return bidirectional(held.model, held.params, held.batch, populations)

    def _start(self, init_particles: dict[str, Any] | None) -> Start | None:
        """Return where particles begin, None for the prior.

        Raises:
            TypeError: if the particles are no dictionary.
        """
        if not isinstance(init_particles, dict | None):
            raise TypeError(f"init_particles must be {{site: values}}, got {type(init_particles).__name__}.")
        if not init_particles and self.guide is None:
            return None
        return Start(init_particles or {}, self.guide, self.guide_params)

    def _counts(self, num_samples: Any, thinning: Any, warmup: Any) -> tuple[int, int, int]:
        """Return how many draws to collect and how, checked; what is None is the constructor's."""
        return (
            self.num_samples if num_samples is None else as_count("num_samples", num_samples, least=0),
            self.thinning if thinning is None else as_count("thinning", thinning),
            self.warmup if warmup is None else as_count("warmup", warmup, least=0),
        )

    def _populations(
        self, method: Callable, kwargs: dict[str, Any], num_particles: Any, num_populations: Any, annealing: Any
    ) -> Populations:
        """Return how populations are annealed, as the arguments of a method say.

        Raises:
            TypeError, ValueError: naming the argument that is off, or one that is an option of :class:`.Annealing`.
            ModelError: for one that the model might mean as well.
        """
        given = dict(zip(OPTIONS, (num_particles, num_populations, annealing), strict=True))
        known = inspect.signature(method).parameters
        own = [name for name in kwargs if name not in Annealing.__dataclass_fields__]
        check_spelling(self.model, method, own, method.__name__)
        check_options(self.model, method, {name: value for name, value in given.items() if name in known})
        for name in kwargs:
            if name in Annealing.__dataclass_fields__ and not accepts(self.model, name):
                raise TypeError(
                    f"'{name}' is an option of Annealing: pass annealing=Annealing({name}={kwargs[name]!r})."
                )
        num_particles = POPULATION if num_particles is None else num_particles
        annealing = Annealing() if annealing is None else annealing
        if not isinstance(annealing, Annealing):
            raise TypeError(f"annealing must be Annealing(…), got {annealing!r}.")
        num_particles = as_count("num_particles", num_particles, least=2)
        return Populations(num_particles, as_count("num_populations", num_populations), annealing)


def _anneal_block(
    model: LatentModel, num: int, populations: Populations, params: Params, batch: Batch
) -> tuple[tuple[Any, Any], Any]:
    """Return ``num`` posterior particles of the data of one block, and how their ladders did."""
    key_anneal, key_draw = random.split(batch.rng_key)
    size, at = max(num, populations.num_particles), batch._replace(rng_key=key_anneal)
    population = anneal_posterior(model.proper(), params, at, size, populations.annealing)
    return draw_posterior(key_draw, population, num), population.annealed.stage_ess
