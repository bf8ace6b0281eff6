r"""The algorithm on one screen.

One training step takes, from the same ``(θ_k, X_k, X̄_k)``: a minibatch with its particles, the prior walkers, and
the gradient of the :mod:`~numpyro_ebipla.training.contrast` in θ, X and X̄; then moves θ by the optimiser, the particles
by their kernel and the walkers by theirs. Every system of the docs' table is a choice of :class:`.Config`: EBIPLA
(2510.12311, eqs. 8–10) is ULA for both families and gradient steps with noise.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, random
from jax.flatten_util import ravel_pytree

from numpyro_ebipla._core.state import Latents, Params, PosteriorState, TrainState
from numpyro_ebipla._core.tree import put
from numpyro_ebipla.kernels.base import Evaluation
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.particles.block import Adaptations, Block, LogJoint, Prepared, Terms, gather
from numpyro_ebipla.training.config import Config
from numpyro_ebipla.training.contrast import Contrast, contrast, cross_entropy
from numpyro_ebipla.training.information import by_coordinate
from numpyro_ebipla.training.minibatch import minibatch
from numpyro_ebipla.training.safeguards import energy_brake, is_due, is_sound, recall, slow_energy, trust
from numpyro_ebipla.walkers.base import Walkers

#: Power of the average :attr:`.TrainState.slow_average`, see :func:`update_average`.
SLOW_AVERAGING = 2.0
#: Tag of the key that orders the data of all steps: no step has this number.
MINIBATCHES = 0xFFFFFFFF


class StepKeys(NamedTuple):
    """Keys of one step: of the model, the optimiser, the particles, the walkers before and after the gradient."""

    model: Array
    optim: Array
    particles: Array
    prepare: Array
    walkers: Array


class Moved(NamedTuple):
    """What a step moves, the particles of its minibatch only; see :class:`.TrainState`."""

    params: Params
    average: Params
    slow_average: Params
    optim_state: Any
    mutable: dict[str, Any]
    prior: dict[str, Any]
    block: Block
    adapt: Adaptations


def step(config: Config, state: TrainState, data: Any) -> tuple[TrainState, dict[str, Array]]:
    """Take one step of the algorithm; see the module. ``data`` are the model's array arguments."""
    keys = step_keys(state)
    batch = Batch(batch_indices(config.model, state), data, keys.model, state.mutable)
    ready, walk, prior, info = prepare(config, state, batch, keys)
    now = contrast_of(config, state, ready, walk, batch)

    updates, optim_state = config.optim.update(
        now.params_grad,
        state.optim_state,
        state.params,
        value=now.value,
        rng_key=keys.optim,
        inverse_temperature=config.model.num_data * config.num_particles,
        num_data=config.model.num_data,
    )
    brake, trusted = energy_brake(config, now.gap), trust(config, state, updates, batch, walk, now.energy)
    params = optax.apply_updates(state.params, slow_energy(config, updates, brake * trusted))
    block, adapt, moved = advance_particles(config, state, batch, keys.particles, ready, now)
    prior, walked = advance_walkers(config, keys.walkers, (state.params, params), batch, prior, now.walkers)

    info |= moved | walked | step_sizes(block, adapt) | path_of(params) | cross_entropy(config.model, now, info)
    info |= {f"{name}/gap": gap.mean for name, gap in now.gap.items()}
    info |= {"brake": brake, "trust": trusted} if config.walkers else {}
    info |= {"contrast": now.value, "grad_norm": optax.tree.norm(now.params_grad)}
    average = update_average(state.average, params, state.step, config.averaging or 0.0)
    slow = update_average(state.slow_average, params, state.step, SLOW_AVERAGING)
    after = Moved(params, average, slow, optim_state, now.mutable, prior, block, adapt)
    return take_if_sound(config, state, batch.indices, after, now, info)


def contrast_at(config: Config, state: TrainState, data: Any) -> Contrast:
    """Return the contrast that the next step would descend."""
    keys = step_keys(state)
    batch = Batch(batch_indices(config.model, state), data, keys.model, state.mutable)
    ready, walk, _, _ = prepare(config, state, batch, keys)
    return contrast_of(config, state, ready, walk, batch)


def contrast_of(config: Config, state: TrainState, ready: Prepared, walk: dict[str, Walkers], batch: Batch) -> Contrast:
    """Return the contrast, with the positions of one particle where holes are looked for."""
    braked, particles = [name for name, strategy in config.walkers.items() if strategy.brake_gap], {}
    if braked:
        params = config.model.constrain_params(state.params)
        one: Latents = jax.tree.map(lambda x: x[:1], ready.block.latents)
        at = config.model.energy_positions(params, *one, batch)
        particles = {name: at[name] for name in braked if name in at}
    return contrast(config, state.params, ready, walk, particles, batch)


def step_keys(state: TrainState) -> StepKeys:
    """Return the keys of the next step."""
    return StepKeys(*random.split(random.fold_in(state.rng_key, state.step), len(StepKeys._fields)))


def prepare(
    config: Config, state: TrainState, batch: Batch, keys: StepKeys
) -> tuple[Prepared, dict[str, Walkers], dict[str, Any], dict[str, Array]]:
    """Return what enters the gradient at ``θ_k``: particles and walkers, the walkers' new states, what to report."""
    model = config.model
    params = model.constrain_params(state.params)

    def draw(key: Array) -> Latents:
        one = lambda k: model.draw_latents(params, batch._replace(rng_key=k))
        return Latents(*jax.vmap(one)(random.split(key, config.num_particles)))

    ready = config.particles.prepare(
        random.fold_in(keys.particles, 1),
        draw,
        log_joint_at(model, state.params, batch, {}),
        model.num_data / model.batch_size,
        *gather(state.posterior, batch.indices),
    )
    ready = jax.lax.stop_gradient(ready)
    densities, positions = model.tilted(params, batch), {}
    if any(strategy.follows_particles for strategy in config.walkers.values()):
        positions = model.energy_positions(params, *ready.block.latents, batch)
    walk, prior = {}, {}
    info = dict(ready.info)
    for i, (name, density) in enumerate(densities.items()):
        key = random.fold_in(keys.prepare, i)
        at = (density, state.prior[name], positions.get(name))
        walk[name], prior[name], said = config.walkers[name].prepare(key, *at)
        info |= {f"{name}/{k}": v for k, v in said.items()}
    return ready, jax.lax.stop_gradient(walk), prior, info


def advance_particles(
    config: Config, state: TrainState, batch: Batch, rng_key: Array, ready: Prepared, now: Contrast
) -> tuple[Block, Adaptations, dict[str, Array]]:
    """Move the particles on at ``θ_k``."""
    model = config.model
    log_joint = log_joint_at(model, state.params, batch, now.log_z if ready.known is None else {})
    ratio = model.num_data / model.batch_size
    block, known, info = ready.block, now.particles, {}
    if config.particles.recalls and not (
        block.latents.shared and model.subsampled
    ):  # no minibatch tells how good these are
        block, known, info["recalled"] = recall(block, known, is_due(ready.adapt, block))
    block, adapt, moved = config.particles.advance(rng_key, log_joint, ratio, block, known, ready.adapt)
    return block, adapt, info | moved


def log_joint_at(model: LatentModel, params: Params, batch: Batch, log_z: dict[str, Array]) -> LogJoint:
    """Return the log densities of a minibatch's particles as a function of these."""

    def log_joint(latents: Latents) -> Terms:
        joint = model.log_joint(model.constrain_params(params), *latents, batch, log_z)
        return Terms(joint.per_datum, joint.rest)

    return log_joint


def advance_walkers(
    config: Config,
    rng_key: Array,
    params: tuple[Params, Params],
    batch: Batch,
    prior: dict[str, Any],
    known: dict[str, Evaluation],
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Let every energy prior's walkers follow the parameters from ``θ_k`` to ``θ_{k+1}``."""
    model = config.model
    now, following = (model.tilted(model.constrain_params(p), batch) for p in params)
    states = {}
    info: dict[str, Array] = {}
    for i, (name, strategy) in enumerate(config.walkers.items()):
        key = random.fold_in(rng_key, i)
        states[name], said = strategy.advance(key, now[name], following[name], prior[name], known.get(name))
        info |= {f"{name}/{k}": v for k, v in said.items()}
    return states, info


def take_if_sound(
    config: Config, state: TrainState, indices: Array | None, after: Moved, now: Contrast, info: dict[str, Array]
) -> tuple[TrainState, dict[str, Array]]:
    """Return the state after the step, or as it was before one that would leave the sound range."""
    sound = is_sound(config, now.value, now.log_density, after.params, after.block, after.prior)
    theta = (state.params, state.average, state.slow_average)
    before = Moved(*theta, state.optim_state, state.mutable, state.prior, *gather(state.posterior, indices))
    kept: Moved = jax.tree.map(lambda a, b: jnp.where(sound, a, b), after, before)
    new = TrainState(
        step=state.step + sound.astype(jnp.int32),
        rng_key=state.rng_key,
        params=kept.params,
        average=kept.average,
        slow_average=kept.slow_average,
        optim_state=kept.optim_state,
        mutable=kept.mutable,
        posterior=scatter(state.posterior, indices, kept.block, kept.adapt),
        prior=kept.prior,
    )
    return new, info | {"sound": sound}


def batch_indices(model: LatentModel, state: TrainState) -> Array | None:
    """Return the data that this step visits; None if it visits all."""
    if not model.subsampled:
        return None
    key = random.fold_in(state.rng_key, jnp.uint32(MINIBATCHES))
    return minibatch(key, state.step, model.num_data, model.batch_size)


def scatter(posterior: PosteriorState, indices: Array | None, block: Block, adapt: Adaptations) -> PosteriorState:
    """Return all particles, with the minibatch's put back: the inverse of :func:`.gather`."""
    momentum, memory = block.momentum, block.memory
    if not posterior.shared:
        memory = put(posterior.memory, indices, memory, 1)
    if momentum is not None and posterior.momentum is not None:
        momentum = momentum._replace(local=put(posterior.momentum.local, indices, momentum.local, 1))
    local = put(posterior.local, indices, block.latents.local, 1)
    by_datum = put(posterior.adapt_local.by_datum, indices, adapt.local.by_datum, 0)
    adapt = adapt._replace(local=adapt.local._replace(by_datum=by_datum))
    return PosteriorState(local, block.latents.shared, momentum, *adapt, memory)


def update_average(average: Params, params: Params, count: Array, power: float) -> Params:
    """Go on with a polynomial-decay average (Shamir and Zhang, 2013), of about the last ``1/(1 + power)`` of all steps.

    It needs no horizon, so a resumed run continues it; ``power = 0`` is the plain mean.
    """
    weight = (1 + power) / (1 + power + count)
    return jax.tree.map(lambda a, p: a + (weight * (p - a)).astype(a.dtype), average, params)


def step_sizes(block: Block, adapt: Adaptations) -> dict[str, Array]:
    """Report step sizes by block, for the history."""
    sizes = {}
    if block.latents.local:
        sizes["step_size_local"] = jnp.exp(adapt.local.log_step)
    if block.latents.shared:
        sizes["step_size_global"] = jnp.exp(adapt.shared.log_step)
    return sizes


def path_of(params: Params) -> dict[str, Array]:
    """Report the unconstrained parameters, where they are few, for the history."""
    return {"params": ravel_pytree(params)[0]} if jax.tree.leaves(params) and by_coordinate(params) else {}
