"""``EBIPLA``: fit a NumPyro model with an energy-based prior by maximum marginal likelihood."""

import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_ebipla._core.errors import warn
from numpyro_ebipla._core.state import Params, TrainState
from numpyro_ebipla._core.validate import (
    as_count,
    check_key,
    check_options,
    check_scalar,
    check_spelling,
    check_untraced,
)
from numpyro_ebipla.checkpoint.store import open_store
from numpyro_ebipla.diagnostics.report import warn_of_run
from numpyro_ebipla.kernels.base import AbstractKernel
from numpyro_ebipla.model.arguments import as_arrays, check_arguments, check_whole
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.newdata import NewData
from numpyro_ebipla.optim.choose import as_optax, by_role, default_optimizer
from numpyro_ebipla.particles.base import AbstractParticles
from numpyro_ebipla.results.build import Collection, moves_to_spend
from numpyro_ebipla.results.fit import Fit
from numpyro_ebipla.results.saving import read_file, restore_fit
from numpyro_ebipla.results.visiting import bind_model
from numpyro_ebipla.system import Settings, Systems
from numpyro_ebipla.training.collect import Plan
from numpyro_ebipla.training.config import parse_posterior
from numpyro_ebipla.training.loop import describe_programs, run_steps
from numpyro_ebipla.training.newton import watch_for
from numpyro_ebipla.training.same_state import check_is_state
from numpyro_ebipla.training.second_start import second_start_for
from numpyro_ebipla.training.step import contrast_at
from numpyro_ebipla.training.stopping import parse_limits
from numpyro_ebipla.walkers.base import AbstractWalkers


class EBIPLA(NewData):
    r"""Maximum marginal likelihood by energy-based interacting particle Langevin dynamics (2510.12311).

    The model is an ordinary NumPyro model: ``numpyro.param`` sites and modules are fitted, latent sites are
    represented by particles, and :class:`.EnergyPrior` sites get walkers that supply the gradient
    of their normaliser. Without an energy prior it is particle gradient descent (2204.12965) or IPLA (2303.13429).

    Args:
        model: a NumPyro model.
        *others: none: what follows has names. SVI's guide and loss have no place here.
        num_particles: N, posterior particles per datum. By default enough for 2000 chains per step, at least 4 and
            at most 64, but fewer, down to one, where a network makes a chain dear; for global latents at least four to
            a coordinate, up to 256, and for local ones of small models as many as control variates need, 14 for one
            coordinate, so that gradients are quiet.
        num_steps: steps of a run, unless ``run(num_steps=…)`` says otherwise.
        num_samples: draws of each particle that a run collects at the fitted parameters; 0 for none.
        thinning: moves between two draws.
        warmup: moves before the first draw.
        optim: an optax transformation or NumPyro optimiser, or ``{"energy": …, "rest": …}`` for the parameters on
            which an energy depends (but no base distribution) and for the others. By default
            :func:`~numpyro_ebipla.optim.choose.default_optimizer`.
        kernel: of the posterior particles: :class:`~numpyro_ebipla.kernels.mala.MALA` (step size and scales adapted),
            :class:`~numpyro_ebipla.kernels.langevin.ULA` or :class:`~numpyro_ebipla.kernels.langevin.Underdamped`.
        num_moves: moves of the particles per step.
        posterior: how the particles are kept, instead of ``kernel`` and ``num_moves``:
            :class:`~numpyro_ebipla.particles.persistent.Particles` (the default),
            :class:`~numpyro_ebipla.particles.restarted.ShortRunParticles`,
            :class:`~numpyro_ebipla.particles.restarted.SuccessiveParticles` or
            :class:`~numpyro_ebipla.particles.weighted.WeightedParticles`.
        prior: how the prior walkers are kept, one strategy for all energy priors or ``{site: strategy}``. By
            default :class:`~numpyro_ebipla.walkers.tempered.Tempered`, and
            :class:`~numpyro_ebipla.walkers.annealed.Annealed` for priors that are conditional on covariates.
        averaging: power of the running average of the parameters that the fit reports: about the last
            ``1 / (1 + averaging)`` of the steps. None reports the last parameters.
        hold: ``{name: value}`` of parameters that are not to be trained: constrained values, or trees of them for
            modules (``"decoder$params"``). They are in ``fit.params``, without standard errors.
        guide: a NumPyro guide, such as that of an SVI run, of the model's arguments. Particles begin at its draws, in
            training and for new data (then it must be amortised), instead of at draws from the prior.
        guide_params: its parameters, such as ``svi_result.params``; those of the model among them are left alone.
        refuse: :class:`.LatentModel` ``-> why it cannot be fitted so, or None``, see :mod:`~numpyro_ebipla.recipes`.
        max_energy: a run stops where the mean log density of the walkers exceeds this in absolute value.
        **static_kwargs: keyword arguments of the model that stay the same in all calls.

    Raises:
        TypeError, ValueError: naming the argument that is off.

    >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
    >>> from jax import random
    >>> def model(y):
    ...     mean = numpyro.param("mean", 0.0)
    ...     with numpyro.plate("data", len(y)):
    ...         x = numpyro.sample("x", dist.Normal(mean, 1))
    ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
    >>> y = 1.0 + 1.4 * random.normal(random.key(1), (200,))
    >>> fit = EBIPLA(model, num_steps=1000).run(random.key(0), y, progress_bar=False)
    >>> bool(abs(fit.params["mean"] - y.mean()) < 0.05)
    True
    >>> fit.get_samples()["x"].shape == (fit.num_chains, 200, 200)
    True
    """

    def __init__(
        self,
        model: Callable,
        *others: Any,
        num_particles: int | None = None,
        num_steps: int = 5000,
        num_samples: int = 200,
        thinning: int = 5,
        warmup: int = 100,
        optim: Any = None,
        kernel: AbstractKernel | None = None,
        num_moves: int | None = None,
        posterior: AbstractParticles | None = None,
        prior: AbstractWalkers | dict[str, AbstractWalkers] | None = None,
        averaging: float | None = 8.0,
        max_energy: float = 1e6,
        hold: Params | None = None,
        guide: Callable | None = None,
        guide_params: Params | None = None,
        refuse: Callable[[LatentModel], str | None] | None = None,
        **static_kwargs: Any,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a function with NumPyro primitives, got {type(model).__name__}.")
        if others:
            raise TypeError(
                f"EBIPLA takes the model and options by name, got {len(others)} more: EBIPLA(model, optim=…). No guide "
                "is needed, as particles stand for the posteriors, and no loss."
            )
        check_spelling(model, type(self).__init__, static_kwargs, "EBIPLA")
        self.model = model
        self.num_steps = as_count("num_steps", num_steps)
        self.num_samples = as_count("num_samples", num_samples, least=0)
        self.thinning = as_count("thinning", thinning)
        self.warmup = as_count("warmup", warmup, least=0)
        strategies = prior.values() if isinstance(prior, dict) else [prior]
        if not all(isinstance(s, AbstractWalkers | None) for s in strategies):
            raise TypeError(
                f"prior must be a walker strategy such as Tempered(), or {{site: strategy}}, got {prior!r}."
            )
        if averaging is not None:
            check_scalar("averaging", averaging, lambda x: 0 <= x < np.inf, "None or a number of at least 0")
        check_scalar("max_energy", max_energy, lambda x: x > 0, "a number above 0")
        if refuse is not None and not callable(refuse):
            raise TypeError(f"refuse must be a function of the LatentModel, got {refuse!r}.")
        if guide is not None and not callable(guide):
            raise TypeError(f"guide must be a function with NumPyro primitives, got {type(guide).__name__}.")
        if not isinstance(guide_params, dict | None) or (guide_params and guide is None):
            raise TypeError("guide_params must be {name: value}, such as svi_result.params, and of a guide=….")
        self.guide = guide
        self.guide_params = dict(guide_params or {})
        optim = default_optimizer if optim is None else optim
        if optim is not default_optimizer:
            optim = by_role(optim) if isinstance(optim, dict) else as_optax(optim)
        self.settings = Settings(
            num_particles=None if num_particles is None else as_count("num_particles", num_particles),
            posterior=parse_posterior(posterior, kernel, num_moves),
            prior=prior,
            optim=optim,
            averaging=averaging,
            max_energy=max_energy,
            refuse=refuse,
            hold=as_arrays("hold", hold),
        )
        self._systems = Systems(model, self.settings, static_kwargs)

    def __repr__(self) -> str:
        """Return the model's name and the settings that are not the default ones."""
        default = {name: option.default for name, option in signature(type(self).__init__).parameters.items()}
        default |= {"posterior": parse_posterior(None, None, None), "optim": default_optimizer, "hold": {}}
        given = self.settings._asdict() | {name: getattr(self, name) for name in ("num_steps", "num_samples", "guide")}
        options = [f"{name}={value!r}" for name, value in given.items() if name != "optim" and value != default[name]]
        options += ["optim=…"] if self.settings.optim is not default_optimizer else []
        return f"EBIPLA({', '.join([getattr(self.model, '__name__', repr(self.model)), *options])})"

    def __getattr__(self, name: str) -> Any:
        """Return one of the settings, such as ``num_particles`` or ``prior``, in the form that the steps use."""
        if name in Settings._fields:
            return getattr(self.settings, name)
        raise AttributeError(f"'EBIPLA' object has no attribute '{name}'")

    # --- in the manner of SVI -------------------------------------------------------------------------

    def init(
        self,
        rng_key: Array,
        *args: Any,
        init_params: Params | None = None,
        init_particles: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> TrainState:
        """Return the initial state.

        Args:
            rng_key: PRNG key of the whole run.
            *args: of the model.
            **kwargs: of the model.
            init_params: constrained values for some ``param`` sites, instead of the model's.
            init_particles: ``{latent: [N, …]}`` constrained values for some latents, of all data, as one draw of
                ``fit.get_samples()``; the others are drawn from the guide or the prior.
        """
        check_whole(self.model, args, {**self._systems.static_kwargs, **kwargs})
        check_untraced("init", rng_key, args, kwargs, init_params, init_particles)
        key_params, key_state = random.split(check_key(rng_key))
        call = self._systems.read(args, kwargs)
        system = self._systems.inspected(call, key_params, init_params)
        return self._systems.begin(system, call, key_state, self._start(init_particles))

    def update(self, state: TrainState, *args: Any, **kwargs: Any) -> tuple[TrainState, Array]:
        """Take one step; return the new state and the contrast. It may be jitted or scanned over.

        A step that would leave the finite numbers is not taken: the state stays as it was, and the contrast is NaN.

        Raises:
            ModelError: naming what differs in a state of another model, or an argument with other data than the
                state's: its particles belong to its data. (Inside jit there is nothing to compare.)
        """
        call = self._systems.read(args, kwargs)
        state, info = self._systems.of_state(state, call).update(state, call.data)
        return state, jnp.where(info["sound"], info["contrast"], jnp.nan)

    def evaluate(self, state: TrainState, *args: Any, **kwargs: Any) -> Array:
        """Return the contrast at ``state``, on its next minibatch, without an update."""
        call = self._systems.read(args, kwargs)
        return contrast_at(self._systems.of_state(state, call).config, state, call.data).value

    def get_params(self, state: TrainState, *args: Any, **kwargs: Any) -> Params:
        """Return constrained parameters: the running average, or the last ones if ``averaging`` is None.

        A new object needs the model's arguments, from which it learns the constraints.
        """
        check_is_state(state)
        known = None if args or kwargs else self._systems.with_params_of(state)
        system = known or self._systems.of(self._systems.read(args, kwargs))
        return system.config.model.all_params(system.config.estimate(state))

    def load(self, path: str | os.PathLike, *args: Any, **kwargs: Any) -> Fit:
        """Return a fit that :meth:`.Fit.save` wrote: the same parameters, draws, history and state.

        The file holds neither the model nor the data, so give them as to the ``run`` of that fit, and to this object
        the same settings.

        Args:
            path: of the file.
            *args: of the model.
            **kwargs: of the model.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: if it is damaged, of another version of the format, or no fit.
            ModelError: if it is of another model, data, precision or settings. Where only releases of JAX, NumPyro or
                Flax differ, it cannot be told whether the model does, and there is a warning.

        >>> import tempfile, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from pathlib import Path
        >>> from jax import random
        >>> def model(y):
        ...     mean = numpyro.param("mean", 0.0)
        ...     with numpyro.plate("data", len(y)):
        ...         x = numpyro.sample("x", dist.Normal(mean, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> y = jnp.arange(3.0)
        >>> fit = EBIPLA(model).run(random.key(0), y, num_steps=10, progress_bar=False)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = fit.save(Path(directory) / "fit.npz")
        ...     again = EBIPLA(model).load(path, y)
        >>> again.params == fit.params and bool((again.get_samples()["x"] == fit.get_samples()["x"]).all())
        True
        """
        found, call = read_file(path), self._systems.read(args, kwargs)
        record = restore_fit(found, self._systems.inspected(call), call, self.model)
        return bind_model(Fit(**{field.name: getattr(record, field.name) for field in fields(record)}))

    def run(
        self,
        rng_key: Array,
        *args: Any,
        num_steps: int | None = None,
        num_samples: int | None = None,
        thinning: int | None = None,
        warmup: int | None = None,
        init_state: TrainState | None = None,
        init_params: Params | None = None,
        init_particles: dict[str, Any] | None = None,
        progress_bar: bool = True,
        sites: Sequence[str] | None = None,
        indices: Any = None,
        max_bytes: int = 2 * 2**30,
        max_time: float | None = None,
        stop_at_gain: float | bool = True,
        stop_at_r_hat: float | dict[str, float] | None = None,
        checkpoint_dir: str | os.PathLike | None = None,
        checkpoint_every: int = 1000,
        keep_checkpoints: int = 3,
        resume: bool | str = True,
        **kwargs: Any,
    ) -> Fit:
        """Fit, then hold the parameters and collect draws of every particle.

        With a ``checkpoint_dir`` the same call, repeated after a kill, gives the uninterrupted fit bit for bit.

        Args:
            rng_key: PRNG key; with ``init_state`` it only seeds the draws.
            *args: of the model. Arrays are traced; Python numbers (``batch_size=500``) are static.
            **kwargs: likewise.
            num_steps: steps to take, at most, by default the constructor's.
            num_samples: draws of each particle, likewise; 0 for none.
            thinning: moves between two draws, likewise.
            warmup: moves before the first draw, likewise.
            init_state: continue from the ``state`` of an earlier fit, bit for bit as if it had not stopped.
            init_params: see :meth:`init`.
            init_particles: see :meth:`init`.
            progress_bar: whether tqdm shows contrast, acceptance and the walkers' health.
            sites: latent or deterministic sites to collect. By default all latent ones, and the deterministic ones as
                far as ``max_bytes`` allows; name the latent ones to leave the others out.
            indices: data whose local latents to collect. By default all, or as many, evenly spaced, as ``max_bytes``
                allows, and of minibatches' data as take half the steps' moves; ``fit.collected`` says which.
            max_bytes: of the draws; where indices are given, or global latents need more, they are refused.
            max_time: seconds after which to take no more steps, from the call on; the draws come on top.
            stop_at_gain: take no more steps once it is known that going on would gain fewer nats than this, of all
                data together, see :mod:`numpyro_ebipla.training.newton`. True stands for 0.0005 nats wherever that can
                be known: of up to 32 parameters, without an energy prior, minibatches or unadjusted chains. False
                takes all steps.
            stop_at_r_hat: take no more steps once split R-hat over the last half of the run, of the parameters and
                of the contrast, is below this, e.g. 1.1; ``{name: threshold}`` chooses parameters or entries of the
                history. See :mod:`numpyro_ebipla.training.stopping`.
            checkpoint_dir: directory of this run's checkpoints. If it holds some, the run goes on from the latest,
                and ``num_steps`` counts from the start of the run.
            checkpoint_every: steps between two checkpoints; one more is written where the run ends.
            keep_checkpoints: how many to keep.
            resume: ``"previous"`` passes over damaged checkpoints; False refuses a directory that holds any.

        Returns:
            A :class:`.Fit`. After a divergence or Ctrl-C it holds the last sound state. A run
            of at least 1000 steps whose cheap diagnostics fail gives an ``EBIPLAWarning`` that says which.

        Raises:
            ValueError: for ``init_state`` together with ``init_params`` or ``init_particles``.
            ModelError: naming the site or argument, before any long work; also for checkpoints of another run, and for
                a ``stop_at_gain`` of which nothing can be known.
            CheckpointError: for a damaged checkpoint.
        """
        check_whole(self.model, args, {**self._systems.static_kwargs, **kwargs})
        check_untraced("run", rng_key, args, kwargs, init_state, init_params, init_particles)
        check_spelling(self.model, self.run, kwargs, "run")
        own = {"sites": sites, "indices": indices, "max_bytes": max_bytes, "max_time": max_time, "resume": resume}
        own |= {"stop_at_gain": stop_at_gain}
        check_options(self.model, self.run, own | {"num_steps": num_steps or None, "stop_at_r_hat": stop_at_r_hat})
        limits = parse_limits(max_time, stop_at_r_hat, stop_at_gain)
        rng_key = check_key(rng_key)
        num_steps = self.num_steps if num_steps is None else as_count("num_steps", num_steps, least=0)
        counts = self._counts(num_samples, thinning, warmup)
        if init_state is not None and (init_params is not None or init_particles is not None):
            raise ValueError(
                "init_state holds parameters and particles already: pass it, or init_params and init_particles."
            )
        start = self._start(init_particles)
        store = open_store(checkpoint_dir, checkpoint_every, keep_checkpoints, resume)
        found = store.read(rng_key, num_steps) if store else None
        call = self._systems.read(args, kwargs)
        if init_state is None:
            key_params, key_state = random.split(rng_key)
            system = self._systems.inspected(call, key_params, init_params)
            begin = partial(self._systems.begin, system, call, key_state, start)
        else:
            check_arguments(self.model, args, call.kwargs)
            system = self._systems.of_state(init_state, call, "init_state", again=True)
            begin = partial(jax.tree.map, jnp.copy, init_state)  # the loop donates its buffers
        data = call.data  # on the device once: each look at the property puts it there anew
        spent = moves_to_spend(system, num_steps)
        plan = Plan(*counts, (), None, max_bytes, spent)
        collection = Collection(system, plan, sites, indices, data)  # refuses before the long work
        watch = watch_for(system.config, system.inspection.params, system.shapes, limits.gain)
        second = second_start_for(system.config, system.inspection.params, system.shapes, system.begin)
        if system.inspection.note:
            warn(system.inspection.note)
        state = begin()
        if store:
            programs = describe_programs(system.config, system.run_chunk, state, data)
            given = (init_params, start and (start.values, start.guide_params)) if init_state is None else init_state
            state, found = store.resume_from(found, state, data, programs, given)
        run = run_steps(system.run_chunk, state, data, num_steps, progress_bar, limits, store, found, watch, second)
        key_draws = random.fold_in(rng_key, 1)
        fit = collection.finish(key_draws, *run, progress_bar, self.model, args, call.kwargs)
        warn_of_run(fit)
        return fit
