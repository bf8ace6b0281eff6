"""What a fit can still say of its posteriors: more draws of its particles, and means without any."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from tqdm.auto import tqdm

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.validate import as_count, as_site_names
from numpyro_ebipla.model.values import SiteLayout, lay_out_values
from numpyro_ebipla.results.sites import trace_sites
from numpyro_ebipla.results.visiting import on_collected
from numpyro_ebipla.training.collect import Plan, as_indices, collect, with_sites
from numpyro_ebipla.training.fitted import Fitted
from numpyro_ebipla.training.means import Moves, posterior_means

#: Tags by which keys are derived from the state's own.
KEY_DRAWS, KEY_MEANS = 0xD4A3, 0x3EA2


@contextmanager
def progress_of(what: str, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Show how many blocks of data are done, of how many."""
    with tqdm(total=1, disable=not shown, desc=what) as bar:

        def progress(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        yield progress


@dataclass(frozen=True, eq=False, repr=False)
class Drawing(Fitted):
    """A run's record whose particles can be moved on at the fitted parameters."""

    def collect(
        self,
        num_samples: int = 200,
        *,
        thinning: int | None = None,
        warmup: int | None = None,
        sites: Sequence[str] | None = None,
        indices: Any = None,
        max_bytes: int = 2 * 2**30,
        rng_key: Array | None = None,
        progress_bar: bool = True,
    ) -> Self:
        """Return the fit with draws of its particles: after ``run(num_samples=0)``, or other draws than it has.

        The particles go on from where the run left them, the parameters held, as at the end of a run. The state is the
        same, and so ``run(init_state=…)`` is not affected.

        Args:
            num_samples: draws of each particle.
            thinning: moves between two draws, by default as in the run.
            warmup: moves before the first draw, likewise.
            sites: latent or deterministic sites, by default all latent ones.
            indices: data whose local latents to collect, by default all, or as many, evenly spaced, as ``max_bytes``
                allows.
            max_bytes: of all draws; where indices are given, or global latents need more, they are refused.
            rng_key: by default derived from the state's own, so that the same call gives the same draws.
            progress_bar: whether to show one.

        Raises:
            ModelError: naming a site or datum that there is not, or draws that are too large; for models without
                latents.

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_ebipla import EBIPLA
        >>> def model(y):
        ...     mean = numpyro.param("mean", 0.0)
        ...     with numpyro.plate("data", len(y)):
        ...         x = numpyro.sample("x", dist.Normal(mean, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> ebipla = EBIPLA(model, num_particles=4, num_steps=10)
        >>> fit = ebipla.run(random.key(0), jnp.arange(3.0), num_samples=0, progress_bar=False)
        >>> fit.collect(20, indices=[2], progress_bar=False)
        Fit(10 steps, 4 particles, 20 draws each of 'x' for 1 of 3 data)
        """
        self._check_latents("collect")
        plan = Plan(*self._moves(num_samples, thinning, warmup), (), None, max_bytes)
        key, estimate = self.key(KEY_DRAWS, rng_key), self.config.estimate(self.state)
        batch = self.batch(None, key)
        plan, layout = with_sites(plan, sites, indices, self.config, estimate, batch)
        config, at = self.config, (estimate, self.state, batch.data, key)
        with progress_of("collect", progress_bar) as progress:
            draws = collect(config.model, config.particles, plan, layout, *at, progress)
        return on_collected(replace(self, draws=draws, plan=plan, layout=layout))

    def posterior_mean(
        self,
        sites: Sequence[str] | None = None,
        indices: Any = None,
        *,
        num_samples: int = 20,
        thinning: int = 2,
        warmup: int = 10,
        rng_key: Array | None = None,
        progress_bar: bool = True,
    ) -> dict[str, np.ndarray]:
        """Return posterior means at some sites of every datum, without keeping a draw.

        The particles go on from where the run left them, the parameters held; what they say is averaged over all
        particles and looks. The default is fifty moves of each: more, where posteriors are hard to move in. For new
        data: ``ebipla.infer(rng_key, fit.params, y, num_samples=0).posterior_mean()``.

        Args:
            sites: latent, deterministic or observed sites, by default all latent ones. At observed ones it is the mean
                of their distribution, so a reconstruction.
            indices: data, by default all.
            num_samples: looks at each particle.
            thinning: moves between two looks.
            warmup: moves before the first look, in which the kernel still adapts.
            rng_key: by default derived from the state's own.
            progress_bar: whether to show one.

        Returns:
            ``{site: array}`` in the shape of one draw over the chosen data.

        Raises:
            ModelError: naming a site that there is not, or one whose distribution has no mean; for models without
                latents.
        """
        self._check_latents("posterior_mean")
        config, moves = self.config, Moves(*self._moves(num_samples, thinning, warmup))
        model, batch = config.model, self.batch(None, self.key(KEY_MEANS, rng_key))
        chosen = as_indices(model, indices)
        found, _ = trace_sites(self, np.arange(model.batch_size), {}, values=False)
        known = [
            name for name, site in found.items() if site.observed or name in (*model.latents, *model.deterministic)
        ]
        names = tuple(model.latents) if sites is None else as_site_names("sites", sites)
        for name in names:
            if name not in known:
                raise ModelError(f"sites: there is no site '{name}' to average; there are {known}.")
        try:
            layout = lay_out_values(model, names, config.estimate(self.state), batch)
        except (NotImplementedError, AttributeError) as e:
            observed = [name for name in names if found[name].observed]
            raise ModelError(f"posterior_mean: a distribution at {observed} has no mean: {e}.") from e
        axes = {name: self._data_axis(found[name].dims, layout[name]) for name in names}
        with progress_of("posterior means", progress_bar) as progress:
            at = (self.params, self.state, batch)
            return posterior_means(model, config.particles, moves, axes, chosen, *at, progress)

    def interpolate(
        self, first: int, second: int, num: int = 8, *, site: str | None = None, particle: int = 0
    ) -> np.ndarray:
        """Return values at a site between the particles of two data, as of images from one to the other.

        Latents of the data go in equal steps from one particle to the other, in unconstrained space; all else (global
        latents, covariates) is as for the first datum.

        Args:
            first: index of a datum.
            second: likewise.
            num: how many values, ends included.
            site: latent, deterministic or observed, where it is the mean of the distribution; by default the only
                observed one.
            particle: whose latents.

        Returns:
            ``[num, …]``.

        Raises:
            ModelError: naming a site or datum that there is not; for models without latents of the data.
        """
        self._check_latents("interpolate")
        model, posterior = self.config.model, self.state.posterior
        ends = np.asarray(as_indices(model, [first, second]))
        found, _ = trace_sites(self, np.arange(model.batch_size), {}, values=False)
        observed = [name for name, at in found.items() if at.observed]
        name = observed[0] if site is None and len(observed) == 1 else site
        if name not in found:
            raise ModelError(f"interpolate: site must be one of {list(found)}, got {site!r}.")
        if not model.local_sites or not 0 <= particle < self.num_chains:
            raise ModelError(
                f"interpolate: there must be latents in the data plate, and the particle one of {self.num_chains}."
            )
        t = jnp.linspace(0.0, 1.0, as_count("num", num))
        batch = self.batch(jnp.asarray(ends[:1], jnp.int32) if model.subsampled else None, random.key(0))
        layout = lay_out_values(model, (name,), self.config.estimate(self.state), batch)[name]
        axis = self._data_axis(found[name].dims, layout)

        def between(x: Array, t: Array) -> Array:
            here = (1 - t) * x[particle, ends[0]] + t * x[particle, ends[1]]
            return here[None] if model.subsampled else x[particle].at[ends[0]].set(here)

        def value(t: Array) -> Array:
            local = jax.tree.map(lambda x: between(x, t)[None], posterior.local)
            shared = jax.tree.map(lambda x: x[particle][None], posterior.shared)
            whole = model.expected(self.params, local, shared, batch, (name,))[name][0]
            return whole if axis is None else jnp.take(whole, 0 if model.subsampled else ends[0], axis)

        return np.asarray(lax.map(value, t))

    def _moves(self, num_samples: int, thinning: int | None, warmup: int | None) -> tuple[int, int, int]:
        """Return the counts, checked; those that are None are the run's."""
        return (
            as_count("num_samples", num_samples),
            self.plan.thinning if thinning is None else as_count("thinning", thinning),
            self.plan.warmup if warmup is None else as_count("warmup", warmup, least=0),
        )

    def _data_axis(self, dims: tuple[str, ...], layout: SiteLayout) -> int | None:
        """Return the axis of the data from the right; without subsampling only a site's plates may tell."""
        if layout.axis is not None or self.config.model.subsampled or self.plate_name not in dims:
            return layout.axis
        return dims.index(self.plate_name) - len(dims)

    def _check_latents(self, what: str) -> None:
        if not self.config.model.latents:
            raise ModelError(f"{what}: the model has no latent site, so there is no posterior.")
