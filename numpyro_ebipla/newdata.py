"""What a fitted model says of data, the parameters held: methods of :class:`~numpyro_ebipla.EBIPLA`, its ``self``."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_ebipla._core.errors import ModelError, warn
from numpyro_ebipla._core.state import Params, TrainState
from numpyro_ebipla._core.static import is_array, is_traced
from numpyro_ebipla._core.tree import all_finite, strong_type
from numpyro_ebipla._core.validate import check_key, check_options, check_untraced, count, number, site_names
from numpyro_ebipla.likelihood.annealed import (
    TOO_SHORT,
    AnnealOptions,
    LogLikelihood,
    check_proper,
    is_joint,
)
from numpyro_ebipla.likelihood.annealed import (
    log_likelihood as _log_likelihood,
)
from numpyro_ebipla.likelihood.bidirectional import Bounds
from numpyro_ebipla.likelihood.bidirectional import bidirectional as _bidirectional
from numpyro_ebipla.likelihood.posterior import anneal_posterior, equal_draws
from numpyro_ebipla.likelihood.reconstruct import reconstruct as _reconstruct
from numpyro_ebipla.model.arguments import like_own
from numpyro_ebipla.model.latent_model import Batch, LatentModel
from numpyro_ebipla.results.fit import Fit
from numpyro_ebipla.training.initial import check_faults

#: Least size of the population from which the particles of new data are taken.
POPULATION = 256


def infer(
    self: Any,
    rng_key: Array,
    params: Params,
    *args: Any,
    progress_bar: bool = False,
    sites: Sequence[str] | None = None,
    indices: Any = None,
    max_bytes: int = 2 * 2**30,
    stage_ess: float = 0.9,
    max_temps: int = 200,
    **kwargs: Any,
) -> Fit:
    """Posterior particles for data never seen, the parameters held.

    Particles are annealed from the prior to each datum's posterior, so that all its modes have their masses, then
    moved and collected as :meth:`run` does after its steps: ``warmup`` moves in which the kernel adapts, then
    ``num_samples`` draws of each.

    Args:
        rng_key: PRNG key.
        params: constrained parameters, such as ``fit.params``; with ``fit.state.mutable`` merged in, if the model has
            mutable state.
        *args: of the model, with another number of data if you like.
        progress_bar: whether tqdm shows the collecting.
        sites: see :meth:`run`.
        indices: see :meth:`run`.
        max_bytes: see :meth:`run`.
        stage_ess: see :func:`~numpyro_ebipla.smc.anneal.anneal`.
        max_temps: likewise; where they were too few, a warning names the data.
        **kwargs: of the model.

    Returns:
        A :class:`~numpyro_ebipla.results.fit.Fit` of no steps. The walkers in its state stand at the base.

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
    options = _options(self, infer, POPULATION, 1, 5, stage_ess, max_temps)
    params, model, batch = _held(self, rng_key, params, args, kwargs)
    key_state, key_anneal, key_run = random.split(batch.rng_key, 3)
    if not model.latents:
        raise ModelError("infer: the model has no latent site, so there is no posterior.")
    check_proper(model, params, batch._replace(indices=model.blocks()[0]), scaled=True)
    system = self._system(args, kwargs)
    config = system.config
    state, faults = system.start(key_state, model.unconstrain_params(params), batch.mutable, batch.data)
    check_faults(faults)
    if not config.particles.weighted:  # which have been annealed already
        batch = batch._replace(rng_key=key_anneal)
        state, left = _annealed(model, config.num_particles, state, params, batch, options)
        _warn_of_short_ladders("infer", left < TOO_SHORT, max_temps, "their particles may not have arrived")
    wanted = {"progress_bar": progress_bar, "sites": sites, "indices": indices, "max_bytes": max_bytes}
    return self.run(key_run, *args, num_steps=0, init_state=state, **wanted, **kwargs)


def log_likelihood(
    self: Any,
    rng_key: Array,
    params: Params,
    *args: Any,
    num_particles: int = 128,
    num_populations: int = 4,
    num_moves: int = 5,
    stage_ess: float = 0.9,
    max_temps: int = 200,
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
        num_moves: MALA moves at each temperature.
        stage_ess: see :func:`~numpyro_ebipla.smc.anneal.anneal`; nearer to one: more temperatures.
        max_temps: likewise.
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
    options = _options(self, log_likelihood, num_particles, num_populations, num_moves, stage_ess, max_temps)
    params, model, batch = _held(self, rng_key, params, args, kwargs)
    found = _log_likelihood(model, params, batch, options)
    if is_traced(found.value):  # inside jit or vmap there are no numbers to look at
        return found
    _check_finite("log_likelihood", found.value)
    _warn_of_short_ladders("log_likelihood", np.isinf(found.std_error), max_temps, "std_error is infinite there")
    return found


def anomaly_score(self: Any, rng_key: Array, params: Params, *args: Any, **kwargs: Any) -> Array:
    """How surprising each datum is: ``−log p_θ(y)`` in nats, ``[M]``, by :meth:`log_likelihood`.

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
    own = {name: value for name, value in kwargs.items() if name not in AnnealOptions.__dataclass_fields__}
    if is_joint(_held(self, rng_key, params, args, own)[1]):
        raise ModelError(
            "anomaly_score: global latents couple the data, or there is no data plate, so no datum has a density of "
            "its own: log_likelihood gives that of all."
        )
    return -log_likelihood(self, rng_key, params, *args, **kwargs).value


def reconstruct(
    self: Any,
    rng_key: Array,
    params: Params,
    *args: Any,
    num_draws: int | None = None,
    sites: Sequence[str] | None = None,
    num_particles: int = 256,
    num_moves: int = 5,
    stage_ess: float = 0.9,
    max_temps: int = 200,
    **kwargs: Any,
) -> dict[str, np.ndarray]:
    """What the model expects at its observed sites, having seen the data: ``E[mean of p(y | x) | y]``.

    A reconstruction of the data, and of missing values an imputation: wrap the model in
    :class:`~numpyro_ebipla.nan_masked` and leave NaN in the data, or use ``obs_mask``. The expectation is over a
    population annealed to each posterior.

    Args:
        rng_key: PRNG key.
        params: see :meth:`infer`.
        *args: of the model.
        num_draws: instead of posterior means, this many equally weighted posterior draws of the distribution's mean
            (not of new data: noise of the observation is not in them).
        sites: observed sites, by default all.
        num_particles: of the population, for each datum.
        num_moves: MALA moves at each temperature.
        stage_ess: see :func:`~numpyro_ebipla.smc.anneal.anneal`.
        max_temps: likewise.
        **kwargs: of the model.

    Returns:
        ``{site: array}`` in the site's shape over all M data, or ``[num_draws, …]``.

    Raises:
        ModelError: naming a site whose distribution has no mean; for improper priors.
    """
    check_options(self.model, reconstruct, {"num_draws": num_draws, "sites": sites})
    options = _options(self, reconstruct, num_particles, 1, num_moves, stage_ess, max_temps)
    num_draws = None if num_draws is None else count("num_draws", num_draws)
    params, model, batch = _held(self, rng_key, params, args, kwargs)
    chosen = None if sites is None else site_names("sites", sites)
    found, left = _reconstruct(model, params, batch, num_draws, chosen, options)
    _warn_of_short_ladders("reconstruct", left < TOO_SHORT, max_temps, "what is said of them may be far off")
    for name, value in found.items():
        if not is_traced(value) and not np.isfinite(value).all():
            raise ModelError(
                f"reconstruct: the mean at '{name}' is not finite: the data are too large for the arithmetic, or lie "
                "where the model gives them no density."
            )
    return found


def bidirectional(
    self: Any,
    rng_key: Array,
    params: Params,
    *args: Any,
    num_particles: int = 64,
    num_populations: int = 4,
    num_moves: int = 5,
    stage_ess: float = 0.98,
    max_temps: int = 500,
    **kwargs: Any,
) -> Bounds:
    """Lower and upper bounds, on average, of ``log p_θ(y)`` for data *simulated* from the model.

    Bidirectional Monte Carlo (Grosse et al., 2015, 2016): the mean gap bounds the error of annealing at these
    settings, without resampling, and so says whether :meth:`log_likelihood` of data like the model's own can be
    relied upon. With an energy prior the latents are draws of an annealed population, see :meth:`.EnergyPrior.sample`,
    and both bounds share the estimate of log Z: its error is not in the gap.

    Args:
        rng_key: PRNG key.
        params: see :meth:`infer`.
        *args: of the model: as many data are simulated, with these covariates; the observed values do not matter.
        num_particles: chains in each direction, for each datum.
        num_populations: for log Z of energy priors.
        num_moves: see :meth:`log_likelihood`.
        stage_ess: likewise.
        max_temps: likewise.
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
    options = _options(self, bidirectional, num_particles, num_populations, num_moves, stage_ess, max_temps)
    params, model, batch = _held(self, rng_key, params, args, kwargs)
    return _bidirectional(model, params, batch, options)


# --- parts --------------------------------------------------------------------------------------------


def _held(
    ebipla: Any, rng_key: Array, params: Params, args: tuple, kwargs: dict[str, Any]
) -> tuple[Params, LatentModel, Batch]:
    """Parameters, the model and what it sees, checked.

    Raises:
        TypeError: for a key that is none.
        ModelError: for parameters that are missing or unknown, or have other shapes than the model's.
    """
    rng_key = check_key(rng_key)
    if not isinstance(params, dict):
        raise TypeError(f"params must be {{name: value}}, such as fit.params, got {type(params).__name__}.")
    for name, value in params.items():
        if not all(is_array(x) or isinstance(x, int | float | np.number) for x in jax.tree.leaves(value)):
            raise TypeError(f"params: the value of '{name}' must be an array, or a tree of arrays, got {value!r}.")
    ebipla._system(args, kwargs)
    system = ebipla._system(args, kwargs, fresh=True)  # looks at these very data
    model, needed, mutable = system.config.model, system.inspection.params, system.inspection.mutable
    missing = sorted({*needed, *mutable} - {*params})
    if missing:
        raise ModelError(
            f"params lacks {missing}: pass all that were fitted, {{**fit.params, **fit.state.mutable}}; the model's "
            "initial values are not used."
        )
    own = {**jax.eval_shape(model.constrain_params, needed), **mutable}
    params = strong_type(like_own("params", params, own))
    held = {name: value for name, value in params.items() if name in needed}
    for name, value in model.unconstrain_params(held).items():
        sound = all_finite(value)
        if not is_traced(sound) and not sound:
            raise ModelError(f"params: the value of '{name}' is not finite or violates its constraint.")
    mutable = {name: params[name] for name in mutable}
    return held, model, Batch(None, ebipla._data(args, kwargs), rng_key, mutable)


def _warn_of_short_ladders(what: str, short: Any, max_temps: int, so: str) -> None:
    """Name the data, if any, that ``max_temps`` temperatures did not reach: ``short`` is ``[M]``, or one for all."""
    if is_traced(short):
        return
    lost = np.flatnonzero(short)
    if len(lost):
        which = f"{len(lost)} data, the first is {lost[0]}" if np.ndim(short) else "all data together"
        warn(
            f"{what}: {max_temps} temperatures were too few for {which}, far from where the model expects data; "
            f"{so}. Raise max_temps."
        )


def _check_finite(what: str, value: Array) -> None:
    """Refuse an answer that is none.

    Raises:
        ModelError: naming the first datum.
    """
    bad = np.flatnonzero(~np.isfinite(np.atleast_1d(value)))
    if len(bad):
        which = f"datum {bad[0]}" if np.ndim(value) else "the data"
        raise ModelError(
            f"{what}: the log density of {which} is not finite at these params (of {len(bad)} data in all): they are "
            "too large for the arithmetic, or lie where the model gives them no density."
        )


def _options(self: Any, method: Callable, *values: Any) -> AnnealOptions:
    num_particles, num_populations, num_moves, stage_ess, max_temps = values
    given = dict(zip(AnnealOptions.__dataclass_fields__, values, strict=True))
    known = inspect.signature(method).parameters
    check_options(self.model, method, {name: value for name, value in given.items() if name in known})
    number("stage_ess", stage_ess, below=1.0)
    return AnnealOptions(
        count("num_particles", num_particles, least=2),
        count("num_populations", num_populations),
        count("num_moves", num_moves),
        float(stage_ess),
        count("max_temps", max_temps),
    )


def _annealed(
    model: LatentModel, num: int, state: TrainState, params: Params, batch: Batch, options: AnnealOptions
) -> tuple[TrainState, np.ndarray]:
    """The state with posterior particles in the place of those drawn from the prior; and how the ladders did."""
    parts = []
    for i, indices in enumerate(model.blocks()):
        here = batch._replace(indices=indices, rng_key=random.fold_in(batch.rng_key, i))
        parts.append(_of_block(model, num, options, params, here))
    (_, glob), left = parts[0]
    local = jax.tree.map(lambda *x: jnp.concatenate(x, 1)[:, : model.num_data], *(part[0][0] for part in parts))
    if left.ndim:
        left = np.concatenate([part[1] for part in parts])[: model.num_data]
    return state._replace(posterior=state.posterior._replace(local=local, glob=glob)), np.asarray(left)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _of_block(model: LatentModel, num: int, options: AnnealOptions, params: Params, batch: Batch) -> Any:
    key_anneal, key_draw = random.split(batch.rng_key)
    size = max(num, options.num_particles)
    at = batch._replace(rng_key=key_anneal)
    population = anneal_posterior(model.proper(), params, at, size, **options.anneal())
    return equal_draws(key_draw, population, num), population.stage_ess
