"""What a run returns: plain data, and views of it for ArviZ and the terminal."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from numpyro_ebipla._core.state import Params
from numpyro_ebipla.diagnostics.checks import Diagnostics
from numpyro_ebipla.diagnostics.report import check_fit
from numpyro_ebipla.likelihood.annealed import log_likelihood
from numpyro_ebipla.likelihood.posterior import Populations
from numpyro_ebipla.results import arviz
from numpyro_ebipla.results.citation import bibtex_of
from numpyro_ebipla.results.drawing import Drawing
from numpyro_ebipla.results.estimates import (
    Covariance,
    ParameterTable,
    akaike,
    parameter_covariance,
    parameter_table,
    schwarz,
)
from numpyro_ebipla.results.information import chosen_params
from numpyro_ebipla.results.saving import save_fit
from numpyro_ebipla.results.summary import html_of, summary_lines
from numpyro_ebipla.smc.normaliser import Estimate

#: Tags by which keys are derived from the state's own.
KEY_DIAGNOSTICS, KEY_LIKELIHOOD = 0xD1A6, 0x10611


@dataclass(frozen=True, eq=False, repr=False)
class Fit(Drawing):
    """A fitted model: arrays, and the functions that were fitted.

    ``az.from_numpyro(fit)`` works as for an ``MCMC`` object; :meth:`to_arviz` gives more groups.

    The fields are those of :class:`.Fitted`: ``params``, ``state``, ``history``, ``draws`` and so on.

    >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
    >>> from jax import random
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
    >>> [line for line in fit.citation().splitlines() if line.startswith("@")]
    ['@software{numpyro_ebipla,', '@misc{akyildiz2023,', '@misc{kuntz2022,', '@misc{titsias2023,']
    """

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
        """Return the fit as ArviZ has it: an ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x).

        ======================  =============================================================================
        group                   content
        ======================  =============================================================================
        posterior               the draws; chain = particle
        sample_stats            ``lp``, the log density of latents and data (by datum where their chains are
                                independent; an energy prior's −log Z is left out), and the acceptance of
                                each draw's last move, averaged over the particles
        prior                   the walkers of the energy priors, see :meth:`.Fitted.prior_samples`; other latents
                                have none
        observed_data           the observed sites, of the chosen data
        constant_data           the other array arguments of the model, whole
        log_likelihood          on request, of the observed sites (``factor`` left out); observed energy
                                priors are normalised by an annealed estimate of log Z
        posterior_predictive    on request, the observed sites redrawn for each draw
        ======================  =============================================================================

        Axes of plates are named by the plate; its coordinates are the indices of the data. Other axes are
        ``<site>_dim_<i>``, or as ``infer={"event_dims": […]}`` at the site says. Slashes in names, as ``scope`` and
        ``random_flax_module`` make them, become dots; the attribute ``name_in_model`` has the name as it was.

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
            ValueError: naming a variable or index that was not collected, names of axes or coordinates that do not fit,
                or what would be too large.
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
        """Return ``{"lp": [particle, draw, ...]}``, for ``az.from_numpyro``."""
        return {} if self.draws is None else {"lp": np.asarray(self.draws.log_density)}

    def get_extra_fields(self, group_by_chain: bool = False) -> dict[str, np.ndarray]:
        """Return the sample statistics, as an ``MCMC`` object does."""
        stats = self.get_sample_stats()
        return stats if group_by_chain else {k: v.reshape((-1, *v.shape[2:])) for k, v in stats.items()}

    # --- estimates and tests --------------------------------------------------------------------------

    def covariance(
        self, params: Sequence[str] | None = None, *, kind: str = "information", cluster: Any = None
    ) -> Covariance:
        """Return the covariance of the estimates.

        ===============  ====================================================================================
        ``kind``         covariance
        ===============  ====================================================================================
        ``information``  the inverse of the observed information H: minus the second derivatives of the log
                         likelihood, which the posterior's draws know by control variates
                         (:mod:`numpyro_ebipla.training.information`)
        ``scores``       the inverse of B, the sum of squares of the scores of all data
        ``sandwich``     H⁻¹ B H⁻¹, which holds where the model is wrong, or data depend on each other within
                         clusters (Huber, 1967; White, 1982); without corrections for few clusters
        ===============  ====================================================================================

        The delta method takes it to the space of the model's parameters. NaN stands for numbers of which the data know
        nothing, such as a variance at zero. Of energy priors fresh draws tell the curvature of log Z.

        Args:
            params: names of parameters, by default all, of which there may be 32 numbers. The others are taken as
                known, as the weights of a network that are not identified.
            kind: see above.
            cluster: of scores and sandwiches: the data that may depend on each other. An array has the cluster of each
                datum; a name is that of a plate whose elements are clusters. ``{plate: labels}`` is for global latents:
                the cluster of each element of several plates, ``{"groups": range(12), "data": group}``.

        Returns:
            ``(names, value)``: of each number with its index, and ``[n, n]``.

        Raises:
            ModelError: for more than 32 parameters, priors that are conditional on covariates, unadjusted kernels, or
                too few draws; for clusters that are not independent.
            ValueError: for a kind that there is not.
        """
        return parameter_covariance(self, params, kind, cluster)[0]

    def standard_errors(
        self, params: Sequence[str] | None = None, *, kind: str = "information", cluster: Any = None
    ) -> dict[str, Any]:
        """Return standard errors of the parameters, a tree of arrays like ``params``; see :meth:`covariance`.

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_ebipla import EBIPLA
        >>> def model(y):
        ...     mean = numpyro.param("mean", 0.0)
        ...     with numpyro.plate("data", len(y)):
        ...         x = numpyro.sample("x", dist.Normal(mean, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> fit = EBIPLA(model, num_steps=300).run(random.key(0), jnp.arange(50.0) / 25, progress_bar=False)
        >>> round(float(fit.standard_errors()["mean"]), 3)  # √(2/50)
        0.2
        """
        errors = np.sqrt(np.diag(self.covariance(params, kind=kind, cluster=cluster).value))
        chosen = chosen_params(self, params)
        flat, unflatten = ravel_pytree({name: value for name, value in self.trained_params.items() if name in chosen})
        return jax.tree.map(np.asarray, unflatten(jnp.asarray(errors, flat.dtype)))

    def summary(
        self,
        prob: float = 0.95,
        params: Sequence[str] | None = None,
        *,
        functions: Mapping[str, Callable[[Params], Any]] | None = None,
        kind: str = "information",
        cluster: Any = None,
    ) -> ParameterTable:
        """Return the estimates with standard errors and Wald intervals in the space of the model's parameters.

        Args:
            prob: that an interval covers.
            params: see :meth:`covariance`.
            functions: ``{name: function of the parameters}`` to show instead of them, such as standard deviations of a
                Cholesky factor, ``{"sd": lambda p: jnp.linalg.norm(p["scale_tril"], axis=-1)}``. The delta method gives
                their errors.
            kind: likewise.
            cluster: likewise.

        Raises:
            ModelError, ValueError: see :meth:`covariance`.
        """
        return parameter_table(self, prob, params, kind, cluster, functions)

    def log_likelihood(self, rng_key: Array | None = None) -> Estimate:
        """Estimate the log likelihood of all data at the fitted parameters, as :meth:`.EBIPLA.log_likelihood` does.

        Args:
            rng_key: by default derived from the state's own.

        Returns:
            ``(value, std_error)`` in nats.

        Raises:
            ModelError: for improper priors and scaled sites.
        """
        batch = self.batch(None, self.key(KEY_LIKELIHOOD, rng_key))
        return log_likelihood(self.config.model, self.params, batch, Populations()).total

    def aic(self, rng_key: Array | None = None) -> float:
        """Return Akaike's criterion, twice the number of parameters less twice :meth:`log_likelihood`."""
        return akaike(self, self.log_likelihood(rng_key).value)

    def bic(self, rng_key: Array | None = None) -> float:
        """Return Schwarz's criterion, with the elements of all observed sites for the number of data."""
        return schwarz(self, self.log_likelihood(rng_key).value)

    # --- files ----------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> Path:
        """Write the fit to a file, without pickle: all but the model and its data, see :meth:`.EBIPLA.load`.

        It is a zip archive of NumPy arrays with a checksum, in the format of the checkpoints.

        Args:
            path: of the file, such as ``"fit.npz"``; one that exists is replaced.

        Returns:
            The path.

        Raises:
            FileNotFoundError: if its directory does not exist.
            OSError: if the disk is full or the like; then nothing has changed.
        """
        return save_fit(self, path)

    # --- the terminal ---------------------------------------------------------------------------------

    def diagnostics(self, rng_key: Array | None = None) -> Diagnostics:
        """Check whether the fit is to be trusted: each check has a threshold, a verdict and what to change.

        ==============================  ===================================================================
        check                           what it looks at
        ==============================  ===================================================================
        non-finite steps, draws         how many there were
        dead networks                   how many have weights for which no datum has a gradient any more
        nats still gained               an upper bound of what the log likelihood has gained since the
                                        average over the last third of the steps, in nats per datum
        nats to gain                    what a Newton step along the way that the run was going would gain
        nats …, in all                  the same two for global latents, of all data together: what the last
                                        ninth of the steps gained, and a Newton step in all parameters
        R-hat, ESS                      the worst of up to 1000 scalars of each collected site
        frozen                          scalars of particles that are the same in all draws
        ties                            share of draws that are equal to another particle's: values at an edge
                                        of the support that the precision cannot resolve
        acceptance                      of the last moves of the particles (MALA)
        walkers' acceptance, ESS, …     what the strategy reports, averaged over the last tenth of the steps
        barrier, brake                  whether the energy is held back
        energy gap                      in E − log p0, walkers less particles, over the last tenth; zero at the
                                        maximum
        log Z, std error                of populations annealed afresh, by their spread
        log Z, walkers − fresh          whether the walkers' log Z, if they know one, agrees with that
        MMD², walkers − fresh           whether the walkers are draws of the prior
        MMD², particles − fresh         whether the prior is where the posteriors of the data are
        particles' ESS, resamplings     of weighted particles, over the last tenth of the steps
        log p(y), weights − fresh       whether weighted particles and fresh populations agree on it
        ==============================  ===================================================================

        An energy prior takes some seconds, for its fresh draws. :mod:`numpyro_ebipla.diagnostics` has more.

        Args:
            rng_key: of the fresh draws, by default derived from the state's own.

        Returns:
            :class:`~numpyro_ebipla.diagnostics.checks.Diagnostics`: print it, or look at ``passed``, ``warnings`` and
            ``checks``.
        """
        return check_fit(self, self.key(KEY_DIAGNOSTICS, rng_key))

    def citation(self) -> str:
        """Return what to cite, in BibTeX: this software, and the sources of the strategies and kernels of the run."""
        return bibtex_of(self.config)

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
            if self.plan.indices is not None:
                text += f" for {len(self.collected)} of {self.config.model.num_data} data"
        early = ", stopped early" if self.stopped and not self.arrived else ""
        return f"Fit({text}{early}{''.join(f'; {note}' for note in self.notes)})"

    def _repr_html_(self) -> str:
        return html_of(self)
