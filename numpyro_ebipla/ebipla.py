"""``EBIPLA``: fit a NumPyro model with an energy-based prior by maximum marginal likelihood."""

import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from tqdm.auto import tqdm

from numpyro_ebipla import collect as collecting
from numpyro_ebipla._errors import EBIPLAWarning, ModelError
from numpyro_ebipla._static import is_array, split_static
from numpyro_ebipla._tree import chain_select, strong_type
from numpyro_ebipla._types import Params, PosteriorState, TrainState
from numpyro_ebipla.inspection import Inspection, check_arguments, inspect_model
from numpyro_ebipla.kernels import MALA, Kernel
from numpyro_ebipla.minibatch import batches_per_epoch
from numpyro_ebipla.optim import as_optax, default_optimizer
from numpyro_ebipla.particles import Particles
from numpyro_ebipla.result import Fit
from numpyro_ebipla.step import Config, batch_indices, contrast, gather, prepare_walkers, step
from numpyro_ebipla.tempering import Tempered
from numpyro_ebipla.walkers import Annealed, WalkerStrategy

#: Steps between two looks of the host at a run; the first looks come early.
CHUNK = 100
#: Draws from the prior for an initial particle whose log density is not finite, before an error.
REDRAWS = 10


class System(NamedTuple):
    """A model with one choice per column of the table of systems, for arguments of given shapes."""

    config: Config
    inspection: Inspection
    run_chunk: Callable
    update: Callable
    start: Callable


class EBIPLA:
    r"""Maximum marginal likelihood by energy-based interacting particle Langevin dynamics (2510.12311).

    The model is an ordinary NumPyro model: ``numpyro.param`` sites and modules are fitted, latent sites are
    represented by particles, and :class:`~numpyro_ebipla.EnergyPrior` sites get walkers that supply the gradient
    of their normaliser. Without an energy prior it is particle gradient descent (2204.12965) or IPLA (2303.13429).

    Args:
        model: a NumPyro model.
        num_particles: N, posterior particles per datum. By default enough for 2000 chains per step, at least 4 and
            at most 64.
        num_steps: steps of a run, unless ``run(num_steps=…)`` says otherwise.
        num_samples: draws of each particle that a run collects at the fitted parameters.
        thinning: moves between two draws.
        warmup: moves before the first draw.
        optim: an optax transformation or NumPyro optimiser. By default
            :func:`~numpyro_ebipla.optim.default_optimizer`.
        kernel: of the posterior particles: :class:`~numpyro_ebipla.kernels.MALA` (step size and scales adapted),
            :class:`~numpyro_ebipla.kernels.ULA` or :class:`~numpyro_ebipla.kernels.Underdamped`.
        num_moves: moves of the particles per step.
        prior: how the prior walkers are kept, one strategy for all energy priors or ``{site: strategy}``. By
            default :class:`~numpyro_ebipla.tempering.Tempered`, and
            :class:`~numpyro_ebipla.walkers.Annealed` for priors that are conditional on covariates.
        averaging: power of the running average of the parameters that the fit reports: about the last
            ``1 / (1 + averaging)`` of the steps. None reports the last parameters.
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
    >>> fit.get_samples()["x"].shape == (fit.num_chains, 100, 200)
    True
    """

    def __init__(
        self,
        model: Callable,
        *,
        num_particles: int | None = None,
        num_steps: int = 5000,
        num_samples: int = 100,
        thinning: int = 5,
        warmup: int = 100,
        optim: Any = None,
        kernel: Kernel | None = None,
        num_moves: int = 1,
        prior: WalkerStrategy | dict[str, WalkerStrategy] | None = None,
        averaging: float | None = 8.0,
        max_energy: float = 1e6,
        **static_kwargs: Any,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a function with NumPyro primitives, got {type(model).__name__}.")
        self.model = model
        self.num_particles = None if num_particles is None else _count("num_particles", num_particles)
        self.num_steps = _count("num_steps", num_steps)
        self.num_samples = _count("num_samples", num_samples)
        self.thinning = _count("thinning", thinning)
        self.warmup = _count("warmup", warmup, least=0)
        self.num_moves = _count("num_moves", num_moves)
        self.kernel = MALA() if kernel is None else kernel
        if not isinstance(self.kernel, Kernel):
            raise TypeError(f"kernel must be ULA(), MALA() or Underdamped(), got {kernel!r}.")
        strategies = prior.values() if isinstance(prior, dict) else [prior]
        if not all(isinstance(s, WalkerStrategy | None) for s in strategies):
            raise TypeError(
                f"prior must be a walker strategy such as Tempered(), or {{site: strategy}}, got {prior!r}."
            )
        self.prior = prior
        if averaging is not None and not averaging >= 0:
            raise ValueError(f"averaging must be None or at least 0, got {averaging!r}.")
        self.averaging = averaging
        if not max_energy > 0:
            raise ValueError(f"max_energy must be positive, got {max_energy!r}.")
        self.max_energy = max_energy
        self.optim = None if optim is None else as_optax(optim)
        self.static_kwargs = static_kwargs
        self._systems: dict[Any, System] = {}

    # --- in the manner of SVI -------------------------------------------------------------------------

    def init(self, rng_key: Array, *args: Any, init_params: Params | None = None, **kwargs: Any) -> TrainState:
        """The initial state.

        Args:
            rng_key: PRNG key of the whole run.
            *args: of the model.
            **kwargs: of the model.
            init_params: constrained values for some ``param`` sites, instead of the model's.
        """
        rng_key = _check_key(rng_key)
        key_params, key_state = random.split(rng_key)
        system = self._system(args, kwargs, key_params, init_params, fresh=True)
        _, data, params, mutable, *_ = system.inspection
        state, faults = system.start(key_state, params, mutable, data)
        _check_faults(faults)
        return state

    def update(self, state: TrainState, *args: Any, **kwargs: Any) -> tuple[TrainState, Array]:
        """One step; returns the new state and the contrast. It may be jitted or scanned over."""
        system = self._system(args, kwargs)
        state, info = system.update(state, self._data(args, kwargs))
        return state, info["contrast"]

    def evaluate(self, state: TrainState, *args: Any, **kwargs: Any) -> Array:
        """The contrast at ``state``, on its next minibatch, without an update."""
        config = self._system(args, kwargs).config
        data = self._data(args, kwargs)
        key = random.fold_in(state.rng_key, state.step)
        key_model, _, _, key_walkers, _ = random.split(key, 5)
        indices = batch_indices(config.model, state)
        densities = config.model.tilted(
            config.model.constrain_params(state.params), indices, data, key_model, state.mutable
        )
        walk, _, _ = prepare_walkers(config, key_walkers, densities, state.prior)
        return contrast(config, state, gather(state, indices), walk, indices, data, key_model).value

    def get_params(self, state: TrainState, *args: Any, **kwargs: Any) -> Params:
        """Constrained parameters: the running average, or the last ones if ``averaging`` is None.

        A new object needs the model's arguments, from which it learns the constraints.
        """
        if not self._systems or args or kwargs:
            config = self._system(args, kwargs).config
        else:
            config = next(reversed(self._systems.values())).config
        return config.model.constrain_params(self._estimate(state))

    def run(
        self,
        rng_key: Array,
        *args: Any,
        num_steps: int | None = None,
        init_state: TrainState | None = None,
        init_params: Params | None = None,
        progress_bar: bool = True,
        sites: Sequence[str] | None = None,
        indices: Any = None,
        max_bytes: int = 2 * 2**30,
        **kwargs: Any,
    ) -> Fit:
        """Fit, then hold the parameters and collect draws of every particle.

        Args:
            rng_key: PRNG key; with ``init_state`` it only seeds the draws.
            *args: of the model. Arrays are traced; Python numbers (``batch_size=500``) are static.
            **kwargs: likewise.
            num_steps: steps to take, by default the constructor's.
            init_state: continue from the ``state`` of an earlier fit, bit for bit as if it had not stopped.
            init_params: see :meth:`init`.
            progress_bar: whether tqdm shows contrast, acceptance and the walkers' health.
            sites: latent or deterministic sites to collect, by default all latent ones.
            indices: data whose local latents to collect, by default all.
            max_bytes: refuse to collect more than this.

        Returns:
            A :class:`~numpyro_ebipla.result.Fit`. After a divergence or Ctrl-C it holds the last sound state.

        Raises:
            ModelError: naming the site or argument, before any long work.
        """
        rng_key = _check_key(rng_key)
        num_steps = self.num_steps if num_steps is None else _count("num_steps", num_steps, least=0)
        if init_state is None:
            state = self.init(rng_key, *args, init_params=init_params, **kwargs)
            system = self._system(args, kwargs)
        else:
            system = self._system(args, kwargs)
            _check_state(system, init_state)
            state = jax.tree.map(jnp.copy, init_state)  # the loop donates its buffers
        config, data = system.config, self._data(args, kwargs)
        plan, layout = self._plan(system, data, sites, indices, max_bytes)

        state, history, stopped = _fit(system, state, data, num_steps, progress_bar)
        estimate = self._estimate(state)
        key_draws = random.fold_in(rng_key, 1)
        with tqdm(total=1, disable=not progress_bar, desc="collect") as bar:

            def progress(done: int, of: int) -> None:
                bar.total = of
                bar.update(done - bar.n)

            draws = None
            try:
                if config.model.latents:
                    draws = collecting.collect(
                        config.model, config.particles, plan, layout, estimate, state, data, key_draws, progress
                    )
            except KeyboardInterrupt:
                stopped = "interrupted while collecting draws: run(num_steps=0, init_state=fit.state) collects them"
                warnings.warn(stopped, EBIPLAWarning, stacklevel=2)
        params = config.model.constrain_params(estimate)
        return Fit.build(
            self.model,
            args,
            {**kwargs, **self.static_kwargs},
            config,
            params,
            state,
            history,
            draws,
            plan,
            stopped,
            layout,
        )

    # --- parts ----------------------------------------------------------------------------------------

    def _estimate(self, state: TrainState) -> Params:
        return state.params if self.averaging is None else state.average

    def _data(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        arrays, _ = split_static((args, {**kwargs, **self.static_kwargs}))
        return jax.tree.map(jnp.asarray, arrays)

    def _system(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        rng_key: Array | None = None,
        init_params: Params | None = None,
        fresh: bool = False,
    ) -> System:
        """The compiled functions for these arguments' shapes; a cache, nothing that a state depends on."""
        kwargs = {**kwargs, **self.static_kwargs}
        arrays, static = split_static((args, kwargs))
        signature = (static, tuple((x.shape, jnp.result_type(x)) for x in arrays), jax.config.jax_enable_x64)
        known = self._systems.get(signature)
        if known is not None and not fresh:
            return known
        if any(isinstance(x, jax.core.Tracer) for x in arrays):
            raise ModelError(
                "the model is seen for the first time inside jit: call init(...) or update(...) once outside with "
                "arguments of these shapes."
            )
        key = random.key(0) if rng_key is None else rng_key
        if known is not None:
            check_arguments(self.model, args, kwargs)
            data = self._data(args, kwargs)
            return known._replace(inspection=known.inspection.restarted(key, init_params, data))
        inspection = inspect_model(self.model, key, args, kwargs, init_params)
        config = self._configure(inspection)
        update = partial(step, config)
        run_chunk = jax.jit(partial(_run_chunk, config), donate_argnums=0)
        start = jax.jit(partial(_initial_state, config))
        system = System(config, inspection, run_chunk, jax.jit(update), start)
        self._systems[signature] = system
        return system

    def _configure(self, inspection: Inspection) -> Config:
        model = inspection.model
        chains = model.batch_size if model.local_sites else 1
        num_particles = self.num_particles or int(np.clip(-(-2000 // chains), 4, 64))
        if not model.latents:
            num_particles = 1
        walkers = {}
        for name, site in model.energies.items():
            chosen = self.prior.get(name) if isinstance(self.prior, dict) else self.prior
            if chosen is None:
                chosen = Annealed(num_walkers=64) if site.per_datum else Tempered()
            if site.per_datum and not chosen.per_datum:
                raise ModelError(
                    f"the energy prior at '{name}' is conditional on covariates of the data, so each datum has a "
                    f"normaliser of its own; {type(chosen).__name__} cannot serve it: use prior=Annealed()."
                )
            walkers[name] = chosen
        if isinstance(self.prior, dict):
            for name in self.prior:
                if name not in model.energies:
                    raise ModelError(f"prior: there is no energy prior at '{name}'; there are {list(walkers)}.")
        return Config(
            model=model,
            particles=Particles(self.kernel, self.num_moves),
            walkers=walkers,
            energy_params=inspection.energy_params,
            optim=default_optimizer(inspection.energy_params) if self.optim is None else self.optim,
            num_particles=num_particles,
            averaging=self.averaging or 0.0,
            max_energy=self.max_energy,
        )

    def _plan(
        self, system: System, data: Any, sites: Sequence[str] | None, indices: Any, max_bytes: int
    ) -> tuple[collecting.Plan, dict]:
        model, inspection = system.config.model, system.inspection
        chosen = collecting.parse_sites(model, sites, inspection.deterministic)
        if indices is not None:
            indices = np.atleast_1d(np.asarray(indices))
            if not np.issubdtype(indices.dtype, np.integer) or np.any((indices < 0) | (indices >= model.num_data)):
                raise ModelError(f"indices must be integers from 0 to {model.num_data - 1}, got {indices}.")
        plan = collecting.Plan(self.num_samples, self.thinning, self.warmup, chosen, indices, max_bytes)
        layout = collecting.layouts(model, chosen, inspection.params, data, inspection.mutable) if chosen else {}
        collecting.check_memory(model, plan, system.config.num_particles, layout)
        return plan, layout


# --- the host loop --------------------------------------------------------------------------------------


def _fit(
    system: System, state: TrainState, data: Any, num_steps: int, progress_bar: bool
) -> tuple[TrainState, dict[str, np.ndarray], str | None]:
    """Chunks of jitted steps, with a look between them."""
    parts: list[dict[str, np.ndarray]] = []
    done, stopped = 0, None
    with tqdm(total=num_steps, disable=not progress_bar, desc="fit") as bar, _held_interrupt() as interrupt:
        try:
            while done < num_steps and stopped is None:
                if interrupt.is_set():
                    raise KeyboardInterrupt
                size = min(1 if done == 0 else 9 if done == 1 else CHUNK, num_steps - done)
                state, taken, info = system.run_chunk(state, data, jnp.asarray(size, jnp.int32))
                taken = int(taken)
                parts.append({k: np.asarray(v)[:taken] for k, v in info.items()})
                sound = parts[-1].pop("sound")
                done += taken
                bar.update(taken)
                bar.set_postfix(_postfix(parts[-1]), refresh=False)
                if not sound.all():
                    stopped = _reason(parts[-1], int(state.step))
                    warnings.warn(stopped, EBIPLAWarning, stacklevel=3)
        except KeyboardInterrupt:
            stopped = f"interrupted after step {int(state.step)}"
            warnings.warn(f"{stopped}; the fit holds what was reached.", EBIPLAWarning, stacklevel=3)
    keys = parts[0] if parts else {"contrast": np.zeros(0)}
    history = {k: np.concatenate([p[k] for p in parts]) if parts else np.zeros(0) for k in keys}
    return state, history, stopped


@contextmanager
def _held_interrupt() -> Iterator[threading.Event]:
    """Inside, the first Ctrl-C only sets the event: a chunk that has begun owns the state's buffers.

    A second one interrupts at once. Signals reach the main thread only; elsewhere nothing changes.
    """
    pressed = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield pressed
        return

    def handler(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        pressed.set()

    signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _run_chunk(
    config: Config, state: TrainState, data: Any, num_steps: Array
) -> tuple[TrainState, Array, dict[str, Array]]:
    """Up to ``num_steps`` steps (traced, so that every length shares one compilation)."""
    shapes = jax.eval_shape(lambda s, d: step(config, s, d)[1], state, data)
    record = jax.tree.map(lambda x: jnp.zeros((CHUNK, *x.shape), x.dtype), shapes)

    def go_on(carry: Any) -> Array:
        i, _, _, sound = carry
        return (i < num_steps) & sound

    def body(carry: Any) -> Any:
        i, state, record, _ = carry
        state, info = step(config, state, data)
        record = jax.tree.map(lambda r, x: r.at[i].set(x), record, info)
        return i + 1, state, record, info["sound"]

    taken, state, record, _ = lax.while_loop(go_on, body, (jnp.zeros((), jnp.int32), state, record, jnp.array(True)))
    return state, taken, record


def _postfix(info: dict[str, np.ndarray]) -> dict[str, str]:
    """What the progress bar shows of a chunk."""
    shown = {"contrast": f"{np.mean(info['contrast']):.3g}"}
    for name, value in info.items():
        if name.startswith("accept") or name.rpartition("/")[2] in ("ess", "swap", "log_z"):
            shown[name.replace("accept_", "acc ")] = f"{value[-1]:.2f}"
    return shown


def _reason(info: dict[str, np.ndarray], reached: int) -> str:
    value = info["contrast"][-1]
    what = (
        "the contrast is not finite"
        if not np.isfinite(value)
        else ("parameters, particles or walkers' energies left the finite range or the bound max_energy")
    )
    return (
        f"the fit diverged at step {reached + 1}: {what} (contrast {value:.3g}). It stopped and holds the state after "
        f"step {reached}. Lower the learning rate, or use adjusted chains (kernel=MALA(), prior=Tempered())."
    )


# --- initial state ------------------------------------------------------------------------------------


def _initial_state(
    config: Config, rng_key: Array, params: Params, mutable: Any, data: Any
) -> tuple[TrainState, dict[str, Array]]:
    """The initial state, and at how many chains each site's log density is not finite."""
    model, kernel = config.model, config.particles.kernel
    key_latents, key_walkers, key_run = random.split(rng_key, 3)
    (local, glob), faults = _draw_particles(config, key_latents, params, mutable, data)
    momentum = jax.tree.map(jnp.zeros_like, (local, glob)) if kernel.has_momentum else None
    indices = jnp.arange(model.batch_size, dtype=jnp.int32) if model.subsampled else None
    densities = model.tilted(model.constrain_params(params), indices, data, key_walkers, mutable)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        rng_key=key_run,
        params=params,
        average=params,
        optim_state=config.optim.init(params),
        mutable=mutable,
        posterior=PosteriorState(local, glob, momentum, kernel.init(local, 2), kernel.init(glob, 1)),
        prior={
            name: config.walkers[name].init(random.fold_in(key_walkers, i), density)
            for i, (name, density) in enumerate(densities.items())
        },
    )
    return jax.tree.map(jnp.copy, strong_type_state(state)), faults  # no buffer twice: the loop donates them


def _draw_particles(config: Config, rng_key: Array, params: Params, mutable: Any, data: Any) -> Any:
    """Particles of all data from the prior: ``[N, M, …]`` and ``[N, …]``, batch by batch; and faults."""
    model = config.model
    B, M = model.batch_size, model.num_data
    key_first, key_rest = random.split(rng_key)
    draw = partial(_draw_batch, config, model.constrain_params(params), mutable, data)
    if not model.subsampled:
        return draw(key_first, None, None)
    parts = batches_per_epoch(M, B)
    indices = (jnp.arange(parts * B, dtype=jnp.int32) % M).reshape(parts, B)
    glob = draw(key_first, indices[0], None)[0][1] if model.global_sites else None
    keys = random.split(key_rest, parts)
    (local, _), faults = lax.map(lambda a: draw(*a, glob), (keys, indices))
    local = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape((-1, parts * B, *x.shape[3:]))[:, :M], local)
    return (local, glob or {}), jax.tree.map(jnp.sum, faults)


def _draw_batch(
    config: Config,
    params: Params,
    mutable: Any,
    data: Any,
    rng_key: Array,
    indices: Array | None,
    known: Any,
) -> tuple[tuple[Any, Any], dict[str, Array]]:
    """Particles of a batch, redrawn a few times where their log density is not finite.

    ``known`` are the global latents if they are drawn already.
    """
    model, num = config.model, config.num_particles
    key_model, key_draws = random.split(rng_key)

    def draw(key: Array) -> tuple[Any, Any]:
        one = lambda k, glob: model.draw_latents(k, params, indices, data, mutable, glob)
        local, glob = jax.vmap(one)(random.split(key, num), known or {})
        return local, known or glob

    def faults(local: Any, glob: Any) -> dict[str, Array]:
        one = lambda local, glob: model.faults(params, local, glob, indices, data, key_model, mutable)
        if not model.latents:
            return jax.tree.map(lambda x: x[None], one({}, {}))
        return jax.vmap(one)(local, glob)

    def attempt(carry: Any) -> Any:
        i, (local, glob), bad = carry
        new_local, new_glob = draw(random.fold_in(key_draws, i))
        if glob and known is None:  # a global latent takes all local ones of its particle with it
            rows = jnp.stack([b.reshape(b.shape[0], -1).any(-1) for b in bad.values()]).any(0)
            local, glob = chain_select(rows, (new_local, new_glob), (local, glob))
        else:
            own = [b if b.ndim == 2 else b[:, None] for b in bad.values()]
            where = jnp.any(jnp.stack(jnp.broadcast_arrays(*own)), 0)
            local = chain_select(where, new_local, local)
        return i + 1, (local, glob), faults(local, glob)

    def go_on(carry: Any) -> Array:
        return (carry[0] <= REDRAWS) & jnp.stack([b.any() for b in carry[2].values()]).any()

    if not model.latents:
        return ({}, {}), jax.tree.map(jnp.sum, faults({}, {}))
    # Everything counts as faulty before the first attempt, so that the model is compiled but once.
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(draw, key_draws))
    nothing = (nothing[0], known or nothing[1])
    bad = jax.tree.map(lambda x: jnp.ones(x.shape, bool), jax.eval_shape(faults, *nothing))
    _, chains, bad = lax.while_loop(go_on, attempt, (jnp.zeros((), jnp.int32), nothing, bad))
    return chains, jax.tree.map(jnp.sum, bad)


def strong_type_state(state: TrainState) -> TrainState:
    """The state without weak types; the key is left as it is."""
    key = state.rng_key
    return strong_type(state._replace(rng_key=jnp.zeros(())))._replace(rng_key=key)


# --- checks -------------------------------------------------------------------------------------------


def _count(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
    return int(value)


def _check_key(rng_key: Any) -> Array:
    """A typed key from a typed or a raw one."""
    if is_array(rng_key):
        if jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key) and rng_key.shape == ():
            return rng_key
        if rng_key.dtype == jnp.uint32 and rng_key.shape == (2,):
            return random.wrap_key_data(jnp.asarray(rng_key))
    raise TypeError(f"rng_key must be a PRNG key such as jax.random.key(0), got {rng_key!r}.")


def _check_faults(faults: dict[str, Array]) -> None:
    """Refuse a start at which a log density is not finite.

    Raises:
        ModelError: naming the site.
    """
    for name, count in faults.items():
        if int(count):
            raise ModelError(
                f"the log density at '{name}' is not finite at {int(count)} of the initial particles, after "
                f"{REDRAWS} further draws from the prior: check that the data lie where the model gives them "
                "positive density, and the initial parameters (init_params)."
            )


def _check_state(system: System, state: Any) -> None:
    """Refuse a state of another model, plate size or configuration.

    Raises:
        TypeError, ModelError
    """
    if not isinstance(state, TrainState):
        raise TypeError(f"init_state must be the state of a fit (fit.state), got {type(state).__name__}.")
    config, model = system.config, system.config.model
    for name, value in state.posterior.local.items():
        if name in model.latents and value.shape[1] != model.num_data:
            plate = model.plate.name if model.plate else ""
            raise ModelError(
                f"init_state holds particles of {value.shape[1]} data at '{name}', but the plate '{plate}' now has "
                f"{model.num_data}: a state belongs to its data; start afresh with init_params=fit.params."
            )

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        return {jax.tree_util.keystr(k): jnp.shape(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}

    for what, ours, theirs in (
        ("parameters", system.inspection.params, state.params),
        (
            "optimiser (optim=)",
            jax.eval_shape(config.optim.init, system.inspection.params),
            state.optim_state,
        ),
    ):
        if shapes(ours) != shapes(theirs):
            raise ModelError(
                f"init_state has other {what} than this EBIPLA and model: {shapes(theirs)} against {shapes(ours)}."
            )
    sites = {*state.posterior.local, *state.posterior.glob}
    if sites != {*model.latents} or {*state.prior} != {*model.energies}:
        raise ModelError(
            f"init_state has latents {sorted(sites)} and energy priors {sorted(state.prior)}, the model has "
            f"{sorted(model.latents)} and {sorted(model.energies)}."
        )
    number = {v.shape[0] for v in jax.tree.leaves((state.posterior.local, state.posterior.glob))}
    if number - {config.num_particles}:
        raise ModelError(
            f"init_state has {number} particles, this EBIPLA {config.num_particles}: pass num_particles={min(number)}."
        )
