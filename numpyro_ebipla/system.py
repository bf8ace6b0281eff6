"""A model compiled for arguments of given shapes: what :class:`.EBIPLA` keeps behind its methods."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, random

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.state import Params, TrainState
from numpyro_ebipla._core.static import is_array, is_traced, outside_jit, split_static
from numpyro_ebipla._core.tree import all_finite, strong_type
from numpyro_ebipla._core.validate import check_key
from numpyro_ebipla.model.arguments import check_arguments, check_whole, like_own, name_arguments, without_held
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.inspection import Inspection, digest_of, inspect_model
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.optim.choose import check_optimiser
from numpyro_ebipla.particles.base import AbstractParticles
from numpyro_ebipla.particles.persistent import Particles
from numpyro_ebipla.training.config import Config, check_posterior, choose_walkers
from numpyro_ebipla.training.initial import check_faults, initial_state
from numpyro_ebipla.training.loop import run_chunk
from numpyro_ebipla.training.num_particles import choose_num_particles
from numpyro_ebipla.training.same_data import SeenData
from numpyro_ebipla.training.same_state import check_state
from numpyro_ebipla.training.starting import Start, start_at
from numpyro_ebipla.training.step import step
from numpyro_ebipla.walkers.base import AbstractWalkers

#: Tag of the key by which a guide is drawn from.
KEY_START = 0x57A7


class Settings(NamedTuple):
    """The options of :class:`.EBIPLA` that decide what a step is composed of."""

    num_particles: int | None
    posterior: AbstractParticles
    prior: AbstractWalkers | dict[str, AbstractWalkers] | None
    optim: Callable[[tuple[str, ...]], optax.GradientTransformationExtraArgs] | optax.GradientTransformationExtraArgs
    averaging: float | None
    max_energy: float
    refuse: Callable[[LatentModel], str | None] | None
    hold: Params | None


class System(NamedTuple):
    """A model with one choice per column of the table of systems, for arguments of given shapes.

    All its programs are here and at ``config.model``, and go when it goes.

    Attributes:
        config: the choices.
        inspection: the model's layout and initial numbers.
        update: ``(state, data) -> (state, info)``, a step.
        run_chunk: ``(state, data, num_steps) -> (state, taken, info)``; it takes the state's buffers.
        start: ``(rng_key, params, mutable, data) -> (state, faults)``.
        shapes: a state of shapes.
    """

    config: Config
    inspection: Inspection
    update: Callable
    run_chunk: Callable
    start: Callable
    shapes: Callable[[], TrainState]

    def begin(
        self, rng_key: Array, params: Params, mutable: dict[str, Any], data: Any, at: Start | None = None
    ) -> TrainState:
        """Return an initial state, with particles drawn from the prior, or begun somewhere else.

        Raises:
            ModelError: naming a site whose log density is not finite, or values that are not its own.
        """
        state, faults = self.start(rng_key, params, mutable, data)
        if at is None or not self.config.model.latents:
            check_faults(faults)
            return state
        return start_at(self.config, at, state, Batch(None, data, random.fold_in(rng_key, KEY_START), mutable))


class Call(NamedTuple):
    """Arguments of the model.

    Attributes:
        args: as they were given.
        kwargs: likewise, with those of the constructor.
        arrays: those among them, in order, as they were given.
        signature: what decides a compilation: the other arguments, shapes and types, and the precision.
    """

    args: tuple
    kwargs: dict[str, Any]
    arrays: tuple
    signature: Any

    @property
    def data(self) -> Any:
        """The arrays as JAX has them: inside ``jax.jit``, traced."""
        return jax.tree.map(jnp.asarray, self.arrays)


class Held(NamedTuple):
    """Parameters that are held, and what they are held for."""

    params: Params
    system: System
    call: Call
    batch: Batch

    @property
    def model(self) -> LatentModel:
        """The model as pure functions."""
        return self.system.config.model


#: Models of systems that may serve other objects, by :meth:`Systems._shared_key`; they hold these systems, and go with
#: the last object or fit that has one.
_SHARED: WeakValueDictionary[Any, LatentModel] = WeakValueDictionary()


class Systems:
    """The systems of one model and its settings, by the shapes of the arguments: a cache, which no state depends on.

    Objects of one model and equal settings share their systems, as long as the log densities are the same programs
    with the same numbers.

    Args:
        model: a NumPyro model.
        settings: what its steps are composed of.
        static_kwargs: keyword arguments of the model that stay the same in all calls.
    """

    def __init__(self, model: Callable, settings: Settings, static_kwargs: dict[str, Any]) -> None:
        self.model, self.settings, self.static_kwargs = model, settings, static_kwargs
        self.made: dict[Any, System] = {}
        self.seen = SeenData()

    def read(self, args: tuple, kwargs: dict[str, Any]) -> Call:
        """Return the arguments of a call, with the constructor's keywords merged in, as SVI does.

        Raises:
            TypeError: naming a keyword that both have.
            ModelError: naming an argument that is a masked array, a loader, or a dictionary with keys that do not
                compare.
        """
        for name in kwargs:
            if name in self.static_kwargs:
                raise TypeError(f"multiple values for keyword argument '{name}', which EBIPLA(…, {name}=…) has fixed.")
        kwargs = {**kwargs, **self.static_kwargs}
        check_whole(self.model, args, kwargs)
        arrays, static = split_static((args, kwargs))
        if any(isinstance(x, np.ma.MaskedArray) for x in arrays):
            check_arguments(self.model, args, kwargs)
        shapes = tuple((x.shape, jnp.result_type(x)) for x in arrays)
        signature = (static, shapes, jax.config.read("jax_enable_x64"))
        return Call(args, kwargs, arrays, signature)

    def of(self, call: Call) -> System:
        """Return the system for arguments of these shapes.

        Raises:
            ModelError: for a model that cannot be fitted, or one that is first seen inside jit.
        """
        return self.made.get(call.signature) or self._make(call, None, None)

    def inspected(self, call: Call, rng_key: Array | None = None, init_params: Params | None = None) -> System:
        """Return the system with an inspection of these very data, for this key and these initial parameters.

        Raises:
            ModelError: naming the site or argument that cannot be fitted.
        """
        known = self.made.get(call.signature)
        if known is None:
            return self._make(call, rng_key, init_params)
        if is_traced(call.arrays):  # there is nothing to look at
            return known
        with outside_jit():
            check_arguments(self.model, call.args, call.kwargs)
            inspection = known.inspection.for_key(_some_key(rng_key), init_params, call.data)
            now = digest_of(inspection.model, inspection.params, inspection.mutable, call.data)
            same = now == inspection.digest
        return known._replace(inspection=inspection) if same else self._make(call, rng_key, init_params)

    def of_state(self, state: Any, call: Call, argument: str = "state", again: bool = False) -> System:
        """Return the system for these arguments, to which a state must belong.

        Args:
            state: of a fit.
            call: the arguments.
            argument: by which the state was given, for errors.
            again: whether to look at the model again, which may hold other numbers by now.

        Raises:
            TypeError, ModelError: saying what differs.
        """
        system = self.inspected(call) if again else self.of(call)
        check_state(system.config, system.shapes(), state, argument)
        names = partial(name_arguments, self.model, call.args, call.kwargs)
        self.seen.check(state.rng_key, call.arrays, system.config.model.num_data, argument, names)
        return system

    def begin(self, system: System, call: Call, rng_key: Array, start: Start | None) -> TrainState:
        """Return an initial state, see :meth:`System.begin`, whose data are remembered."""
        found = system.inspection
        state = system.begin(rng_key, found.params, found.mutable, found.data, start)
        self.seen.remember(state.rng_key, call.arrays, system.config.model.num_data)
        return state

    def with_params_of(self, state: TrainState) -> System | None:
        """Return the latest system with parameters like those of a state, if there is one."""
        shapes = lambda params: jax.tree.map(jnp.shape, params)
        made = reversed(self.made.values())
        return next((s for s in made if shapes(s.inspection.params) == shapes(state.params)), None)

    def hold(self, rng_key: Any, params: Any, args: tuple, kwargs: dict[str, Any]) -> Held:
        """Return parameters to hold, with the model and what it sees, checked.

        Raises:
            TypeError: if ``rng_key`` is not a PRNG key, or ``params`` not a dictionary of arrays.
            ModelError: for parameters that are missing or unknown, or have other shapes than the model's.
        """
        rng_key = check_key(rng_key)
        if not isinstance(params, dict):
            raise TypeError(f"params must be {{name: value}}, such as fit.params, got {type(params).__name__}.")
        for name, value in params.items():
            if not all(is_array(x) or isinstance(x, int | float | np.number) for x in jax.tree.leaves(value)):
                raise TypeError(f"params: the value of '{name}' must be an array, or a tree of arrays, got {value!r}.")
        call = self.read(args, kwargs)
        system = self.inspected(call)
        model, needed, mutable = system.config.model, system.inspection.params, system.inspection.mutable
        missing = sorted({*needed, *mutable} - {*params})
        if missing:
            raise ModelError(
                f"params lacks {missing}: pass all that were fitted, {{**fit.params, **fit.state.mutable}}; the "
                "model's initial values are not used."
            )
        params = without_held("params", params, model.held)
        own = {**jax.eval_shape(model.constrain_params, needed), **mutable}
        params = strong_type(like_own("params", params, own))
        held = {name: value for name, value in params.items() if name in needed}
        for name, value in model.unconstrain_params(held).items():
            sound = all_finite(value)
            if not is_traced(sound) and not sound:
                raise ModelError(f"params: the value of '{name}' is not finite or violates its constraint.")
        mutable = {name: params[name] for name in mutable}
        return Held(held, system, call, Batch(None, call.data, rng_key, mutable))

    # --- parts ----------------------------------------------------------------------------------------

    def _make(self, call: Call, rng_key: Array | None, init_params: Params | None) -> System:
        """Inspect the model, choose what the settings leave open, and compile nothing yet."""
        if is_traced(call.arrays):
            raise ModelError(
                "the model is seen for the first time inside jit: call init(...) or update(...) once outside with "
                "arguments of these shapes."
            )
        with outside_jit():
            inspection = inspect_model(
                self.model, _some_key(rng_key), call.args, call.kwargs, init_params, self.settings.hold
            )
            key = self._shared_key(call)
            if (known := _known_system(key, inspection)) is not None:
                self.made[call.signature] = known
                return known
            config = self._configure(inspection)
        update = config.model.jit(partial(step, config))
        chunk = jax.jit(partial(run_chunk, update), donate_argnums=0)
        start = config.model.jit(partial(initial_state, config))
        begin = (random.key(0), inspection.params, inspection.mutable, inspection.data)
        shapes = cache(lambda: jax.eval_shape(start, *begin)[0])
        system = System(config, inspection, update, chunk, start, shapes)
        self.made[call.signature] = system
        if key is not None:
            config.model.systems[key] = system
            _SHARED[key] = config.model
        return system

    def _shared_key(self, call: Call) -> Any:
        """Return what systems that may be shared agree in; None where that cannot be said."""
        key = (self.model, self.settings._replace(hold=self.settings.hold or None), call.signature)
        try:
            hash(key)
        except TypeError:  # parameters that are held, walkers by site
            return None
        return key

    def _configure(self, inspection: Inspection) -> Config:
        """Choose what the settings leave open."""
        model, settings = inspection.model, self.settings
        check_posterior(model, settings.posterior, settings.refuse)
        num_particles = settings.num_particles or choose_num_particles(inspection)
        particles: AbstractParticles = settings.posterior
        if not model.latents:
            num_particles, particles = 1, Particles()  # there are none to keep, in whatever way
        optim: Any = settings.optim
        if not isinstance(optim, optax.GradientTransformation):
            optim = optim(inspection.energy_params)
        check_optimiser(optim, inspection.params)
        return Config(
            model=model,
            particles=particles,
            walkers=choose_walkers(model, settings.prior),
            energy_params=inspection.energy_params,
            optim=optim,
            num_particles=num_particles,
            averaging=settings.averaging,
            max_energy=settings.max_energy,
        )


def _known_system(key: Any, inspection: Inspection) -> System | None:
    """Return the system of another object whose model is the same, with the numbers of this inspection."""
    model = _SHARED.get(key)
    if model is None or not inspection.digest:
        return None
    known: System = model.systems[key]
    if known.inspection.digest != inspection.digest or known.inspection.layout != inspection.layout:
        return None
    return known._replace(inspection=inspection._replace(model=model))


def _some_key(rng_key: Array | None) -> Array:
    """Return the key, or else one that always is the same: for a look at the model it does not matter."""
    return random.key(0) if rng_key is None else rng_key
