r"""The algorithm on one screen.

One training step takes, from the same ``(θ_k, X_k, X̄_k)``: a minibatch with its particles, the prior walkers, and
the gradient of the :mod:`~numpyro_ebipla.training.contrast` in θ, X and X̄; then moves θ by the optimiser, the particles
by their kernel and the walkers by theirs. Every system of the docs' table is a choice of :class:`Config`: EBIPLA
(2510.12311, eqs. 8–10) is ULA for both families and gradient steps with noise.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, random

from numpyro_ebipla._core.state import Params, PosteriorState, TrainState, WalkerState
from numpyro_ebipla._core.tree import all_finite, put
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.particles.base import Adaptations, Block, LogJoint, Prepared, gather
from numpyro_ebipla.training.config import Config
from numpyro_ebipla.training.contrast import Contrast, contrast, cross_entropy
from numpyro_ebipla.training.minibatch import minibatch
from numpyro_ebipla.training.safeguards import braked, due, energy_brake, recalled, trust
from numpyro_ebipla.walkers.base import Walkers

#: Of :attr:`.TrainState.slow_average`, see :func:`averaged`.
SLOW_AVERAGING = 2.0


def step(config: Config, state: TrainState, data: Any) -> tuple[TrainState, dict[str, Array]]:
    """One step of the algorithm; see the module. ``data`` are the model's array arguments."""
    key_model, key_optim, key_posterior, key_prepare, key_walkers = step_keys(state)
    batch = Batch(batch_indices(config.model, state), data, key_model, state.mutable)
    ready, walk, prior, info = prepare(config, state, batch, key_posterior, key_prepare)
    now = contrast_of(config, state, ready, walk, batch)

    updates, optim_state = config.optim.update(
        now.params_grad,
        state.optim_state,
        state.params,
        value=now.value,
        rng_key=key_optim,
        inverse_temperature=config.model.num_data * config.num_particles,
        num_data=config.model.num_data,
    )
    brake, trusted = energy_brake(config, now.gap), trust(config, state, updates, batch, walk, now.energy)
    params = optax.apply_updates(state.params, braked(config, updates, brake * trusted))
    block, adapt, moved = advance_particles(config, state, batch, key_posterior, ready, now)
    prior, walked = advance_walkers(config, key_walkers, (state.params, params), batch, prior, now.walkers)

    info |= moved | walked | step_sizes(block, adapt) | cross_entropy(config.model, now, info)
    info |= {f"{name}/gap": gap.mean for name, gap in now.gap.items()}
    info |= {"brake": brake, "trust": trusted} if config.walkers else {}
    info |= {"contrast": now.value, "grad_norm": optax.tree.norm(now.params_grad)}
    average = averaged(state.average, params, state.step, config.averaging or 0.0)
    slow = averaged(state.slow_average, params, state.step, SLOW_AVERAGING)
    after = (params, average, slow, optim_state, now.mutable, prior, (block, adapt))
    return sound_step(config, state, batch.indices, after, now, info)


def contrast_at(config: Config, state: TrainState, data: Any) -> Contrast:
    """The contrast that the next step would descend."""
    key_model, _, key_posterior, key_prepare, _ = step_keys(state)
    batch = Batch(batch_indices(config.model, state), data, key_model, state.mutable)
    ready, walk, _, _ = prepare(config, state, batch, key_posterior, key_prepare)
    return contrast_of(config, state, ready, walk, batch)


def contrast_of(config: Config, state: TrainState, ready: Prepared, walk: dict[str, Walkers], batch: Batch) -> Contrast:
    """The contrast with what the strategies want of it."""
    shared = {name for name, strategy in config.walkers.items() if strategy.shares_gradient}
    braked, particles = [name for name, strategy in config.walkers.items() if strategy.brake_gap], {}
    if braked:
        params = config.model.constrain_params(state.params)
        local, glob = jax.tree.map(lambda x: x[:1], (ready.block.local, ready.block.glob))
        at = config.model.energy_positions(params, local, glob, batch)
        particles = {name: at[name] for name in braked if name in at}
    return contrast(config.model, state.params, ready, walk, shared, particles, batch)


def step_keys(state: TrainState) -> Array:
    """Keys of the model, the optimiser, the particles, the walkers before and the walkers after the gradient."""
    return random.split(random.fold_in(state.rng_key, state.step), 5)


def prepare(
    config: Config, state: TrainState, batch: Batch, key_posterior: Array, key_walkers: Array
) -> tuple[Prepared, dict[str, Walkers], dict[str, WalkerState], dict[str, Array]]:
    """What enters the gradient at ``θ_k``: particles and walkers, the walkers' new states, what to report."""
    model = config.model
    params = model.constrain_params(state.params)

    def draw(key: Array) -> tuple[Any, Any]:
        one = lambda k: model.draw_latents(params, batch._replace(rng_key=k))
        return jax.vmap(one)(random.split(key, config.num_particles))

    ready = config.particles.prepare(
        random.fold_in(key_posterior, 1),
        draw,
        log_joint_at(model, state.params, batch, {}),
        model.num_data / model.batch_size,
        *gather(state.posterior, batch.indices),
    )
    ready = jax.lax.stop_gradient(ready)
    densities, positions = model.tilted(params, batch), {}
    if any(strategy.follows_particles for strategy in config.walkers.values()):
        positions = model.energy_positions(params, *ready.block[:2], batch)
    walk, prior = {}, {}
    info = dict(ready.info)
    for i, (name, density) in enumerate(densities.items()):
        key = random.fold_in(key_walkers, i)
        at = (density, state.prior[name], positions.get(name))
        walk[name], prior[name], said = config.walkers[name].prepare(key, *at)
        info |= {f"{name}/{k}": v for k, v in said.items()}
    return ready, jax.lax.stop_gradient(walk), prior, info


def advance_particles(
    config: Config, state: TrainState, batch: Batch, rng_key: Array, ready: Prepared, now: Contrast
) -> tuple[Block, Adaptations, dict[str, Array]]:
    """The particles moved on at ``θ_k``."""
    model = config.model
    log_joint = log_joint_at(model, state.params, batch, now.log_z if ready.known is None else {})
    ratio = model.num_data / model.batch_size
    block, known, info = ready.block, now.particles, {}
    if config.particles.recalls and not (block.glob and model.subsampled):  # no minibatch tells how good these are
        block, known, info["recalled"] = recalled(block, known, due(ready.adapt, block))
    block, adapt, moved = config.particles.advance(rng_key, log_joint, ratio, block, known, ready.adapt)
    return block, adapt, info | moved


def log_joint_at(model: LatentModel, params: Params, batch: Batch, log_z: dict[str, Array]) -> LogJoint:
    """Log densities of a minibatch's particles as a function of these."""
    return lambda local, glob: model.log_joint(model.constrain_params(params), local, glob, batch, log_z)[:2]


def advance_walkers(
    config: Config,
    rng_key: Array,
    params: tuple[Params, Params],
    batch: Batch,
    prior: dict[str, WalkerState],
    known: dict[str, tuple[Array, Array]],
) -> tuple[dict[str, WalkerState], dict[str, Array]]:
    """Every energy prior's walkers, following the parameters from ``θ_k`` to ``θ_{k+1}``."""
    model = config.model
    now, following = (model.tilted(model.constrain_params(p), batch) for p in params)
    states = {}
    info: dict[str, Array] = {}
    for i, (name, strategy) in enumerate(config.walkers.items()):
        key = random.fold_in(rng_key, i)
        states[name], said = strategy.advance(key, now[name], following[name], prior[name], known.get(name))
        info |= {f"{name}/{k}": v for k, v in said.items()}
    return states, info


def sound_step(
    config: Config, state: TrainState, indices: Array | None, after: tuple, now: Contrast, info: dict[str, Array]
) -> tuple[TrainState, dict[str, Array]]:
    """The state after the step. One that would leave the finite numbers is not taken: the state stays as it was."""
    params, _, _, _, _, prior, (block, _) = after
    energy = [jnp.max(jnp.abs(e)) for e in now.log_density.values()]
    positions = [walkers.position for walkers in prior.values()]
    sound = (
        all_finite((now.value, params, block[:3], positions)) & (jnp.array([0.0, *energy]) < config.max_energy).all()
    )
    theta = (state.params, state.average, state.slow_average)
    before = (*theta, state.optim_state, state.mutable, state.prior, gather(state.posterior, indices))
    kept = jax.tree.map(lambda a, b: jnp.where(sound, a, b), after, before)
    params, average, slow, optim_state, mutable, prior, chains = kept
    posterior = scatter(state.posterior, indices, *chains)
    taken = state.step + sound.astype(jnp.int32)
    new = TrainState(taken, state.rng_key, params, average, slow, optim_state, mutable, posterior, prior)
    return new, info | {"sound": sound}


def batch_indices(model: LatentModel, state: TrainState) -> Array | None:
    """The data that this step visits; None if it visits all."""
    if not model.subsampled:
        return None
    key = random.fold_in(state.rng_key, jnp.uint32(0xFFFFFFFF))
    return minibatch(key, state.step, model.num_data, model.batch_size)


def scatter(posterior: PosteriorState, indices: Array | None, block: Block, adapt: Adaptations) -> PosteriorState:
    """All particles, with the minibatch's put back: the inverse of :func:`.gather`."""
    momentum, memory = block.momentum, block.memory
    if not posterior.glob:
        memory = put(posterior.memory, indices, memory, 1)
    if momentum is not None:
        momentum = (put(posterior.momentum[0], indices, momentum[0], 1), momentum[1])
    local = put(posterior.local, indices, block.local, 1)
    by_datum = put(posterior.adapt_local.by_datum, indices, adapt[0].by_datum, 0)
    return PosteriorState(local, block.glob, momentum, adapt[0]._replace(by_datum=by_datum), adapt[1], memory)


def averaged(average: Params, params: Params, count: Array, power: float) -> Params:
    """Polynomial-decay average (Shamir and Zhang, 2013): of about the last ``1/(1 + power)`` of all steps.

    It needs no horizon, so a resumed run continues it; ``power = 0`` is the plain mean.
    """
    weight = (1 + power) / (1 + power + count)
    return jax.tree.map(lambda a, p: a + (weight * (p - a)).astype(a.dtype), average, params)


def step_sizes(block: Block, adapt: Adaptations) -> dict[str, Array]:
    """Step sizes by block, for the history."""
    sizes = {}
    if block.local:
        sizes["step_size_local"] = jnp.exp(adapt[0].log_step)
    if block.glob:
        sizes["step_size_global"] = jnp.exp(adapt[1].log_step)
    return sizes
