r"""The algorithm on one screen.

One training step takes, from the same ``(θ_k, X_k, X̄_k)``: a minibatch with its particles, the prior walkers,
the gradient of

    contrast = (1/NB) Σ_{n,m} φ_m(θ, X^{n,m}) − Σ_p w_p U_α(X̄^p),        φ_m = −log p_β(y_m | x) + U_α(x)

in θ (Fisher's identity) and in X and X̄ (Langevin drifts) by one backward pass; then moves θ by the optimiser,
the particles by their kernel and the walkers by theirs. Every system of the docs' table is a choice of
:class:`Config`: EBIPLA (2510.12311, eqs. 8–10) is ULA for both families and gradient steps with noise.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, random

from numpyro_ebipla._tree import all_finite, put, take
from numpyro_ebipla._types import Adaptation, Params, TrainState, WalkerState
from numpyro_ebipla.anneal import TiltedDensity
from numpyro_ebipla.minibatch import minibatch
from numpyro_ebipla.model import LatentModel
from numpyro_ebipla.particles import Block, Particles
from numpyro_ebipla.walkers import Walkers, WalkerStrategy


class Config(NamedTuple):
    """One choice per column of the table of systems: what a step is composed of."""

    model: LatentModel
    particles: Particles
    walkers: dict[str, WalkerStrategy]
    energy_params: tuple[str, ...]
    optim: optax.GradientTransformationExtraArgs
    num_particles: int
    averaging: float
    max_energy: float


class Contrast(NamedTuple):
    """The value that θ descends, and everything that its backward pass knows."""

    value: Array
    params_grad: Params
    particles: tuple[Array, Any, Array, Any]
    walkers: dict[str, tuple[Array, Array]]
    log_density: dict[str, Array]
    log_z: dict[str, Array]
    gap: dict[str, tuple[Array, Array]]
    mutable: dict[str, Any]


def step(config: Config, state: TrainState, data: Any) -> tuple[TrainState, dict[str, Array]]:
    """One step of the algorithm; see the module. ``data`` are the model's array arguments."""
    model = config.model
    key = random.fold_in(state.rng_key, state.step)
    key_model, key_optim, key_posterior, key_walkers, key_advance = random.split(key, 5)
    indices = batch_indices(model, state)
    here = gather(state, indices)
    old_adapt = (state.posterior.adapt_local, state.posterior.adapt_global)

    def densities(params: Params) -> dict[str, TiltedDensity]:
        constrained = model.constrain_params(params)
        return model.tilted(constrained, indices, data, key_model, state.mutable)

    walk, prior, info = prepare_walkers(config, key_walkers, densities(state.params), state.prior)
    now = contrast(config, state, here, walk, indices, data, key_model)
    info |= {f"{name}/gap": gap for name, (gap, _) in now.gap.items()}
    updates, optim_state = config.optim.update(
        now.params_grad,
        state.optim_state,
        state.params,
        value=now.value,
        rng_key=key_optim,
        inverse_temperature=model.num_data * config.num_particles,
    )
    brake = energy_brake(config, info, now.gap)
    info |= {"brake": brake} if config.walkers else {}
    params = optax.apply_updates(state.params, braked(config, updates, brake))

    def log_joint(local: Any, glob: Any) -> tuple[Array, Array]:
        constrained = model.constrain_params(state.params)
        rest = (indices, data, key_model, state.mutable, now.log_z)
        return model.log_joint(constrained, local, glob, *rest)[:2]

    ratio = model.num_data / model.batch_size
    block, adapt, moved = config.particles.advance(key_posterior, log_joint, ratio, here, now.particles, old_adapt)
    prior, walked = advance_walkers(config, key_advance, densities(state.params), densities(params), prior, now.walkers)
    info |= moved | walked | step_sizes(block, adapt)
    info |= {"contrast": now.value, "grad_norm": optax.tree.norm(now.params_grad)}
    # A step that would leave the finite numbers is not taken: the state stays the last sound one.
    energy = [jnp.max(jnp.abs(e)) for e in now.log_density.values()]
    positions = [walkers.position for walkers in prior.values()]
    info["sound"] = sound = (
        all_finite((now.value, params, block, positions)) & (jnp.array([0.0, *energy]) < config.max_energy).all()
    )
    average = averaged(state.average, params, state.step, config.averaging)
    small = (params, average, optim_state, now.mutable, prior, block, adapt)
    before = (state.params, state.average, state.optim_state, state.mutable, state.prior, here, old_adapt)
    kept = jax.tree.map(lambda a, b: jnp.where(sound, a, b), small, before)
    params, average, optim_state, mutable, prior, block, adapt = kept
    posterior = scatter(state, indices, block, adapt)
    taken = state.step + sound.astype(jnp.int32)
    return TrainState(taken, state.rng_key, params, average, optim_state, mutable, posterior, prior), info


def contrast(
    config: Config,
    state: TrainState,
    block: Block,
    walk: dict[str, Walkers],
    indices: Array | None,
    data: Any,
    rng_key: Array,
) -> Contrast:
    """The contrast, and by one backward pass its gradient in θ, in the particles and in the walkers."""
    model, N, B, M = config.model, config.num_particles, config.model.batch_size, config.model.num_data
    shared = {name for name in walk if config.walkers[name].shares_gradient}

    def loss(params: Params, local: Any, glob: Any, moving: dict, shift: dict) -> tuple[Array, Any]:
        params, positions = model.constrain_params(params), held | moving
        priors = model.energy_priors(params, indices, data, rng_key, state.mutable)
        tilted = {name: prior.tilted() for name, prior in priors.items()}
        log_density = {name: tilted[name].log_density(positions[name]) for name in walk}
        # ∇ log Z = −E[∇U]: this stands for log Z wherever the model's log density needs it.
        log_z = {
            name: (jnp.sum(walk[name].weight * log_density[name], 0) + shift[name]).reshape(priors[name].batch_shape)
            for name in walk
        }
        per_datum, rest, mutable, energies = model.log_joint(
            params, local, glob, indices, data, rng_key, state.mutable, log_z
        )
        gap = {name: energy_gap(walk[name], tilted[name], positions[name], energies[name]) for name in walk}
        value = -(per_datum.mean() + rest.mean() / M)
        return value, (per_datum, rest, log_density, mutable, log_z, gap)

    positions = {name: w.position for name, w in walk.items()}
    held = {name: jax.lax.stop_gradient(x) for name, x in positions.items() if name not in shared}
    moving = {name: positions[name] for name in shared}
    shift = {name: jnp.zeros(w.weight.shape[1:], w.weight.dtype) for name, w in walk.items()}

    (value, (per_datum, rest, log_density, mutable, log_z, gap)), grads = jax.value_and_grad(
        loss, argnums=(0, 1, 2, 3, 4), has_aux=True
    )(state.params, block.local, block.glob, moving, shift)
    params_grad, local, glob, walkers, coefficient = grads
    # From derivatives of a mean back to those of each chain's own log density.
    local = jax.tree.map(lambda g: -N * B * g, local)
    glob = jax.tree.map(lambda g: -N * M * g, glob)
    whole = M / B * per_datum.sum(-1) + rest

    def undo_weight(name: str) -> tuple[Array, Array]:
        scale = coefficient[name] * walk[name].weight
        return log_density[name], walkers[name] / scale.reshape(scale.shape + (1,) * (walkers[name].ndim - scale.ndim))

    known = (per_datum, local, whole, glob)
    mean = {name: jnp.sum(walk[name].weight * log_density[name], 0) for name in walk}
    return Contrast(value, params_grad, known, {n: undo_weight(n) for n in shared}, mean, log_z, gap, mutable)


# --- walkers, minibatches, averages -------------------------------------------------------------------


def prepare_walkers(
    config: Config, rng_key: Array, densities: dict[str, TiltedDensity], prior: dict[str, WalkerState]
) -> tuple[dict[str, Walkers], dict[str, WalkerState], dict[str, Array]]:
    """``prepare`` of every energy prior's strategy."""
    walk, states = {}, {}
    info: dict[str, Array] = {}
    for i, (name, density) in enumerate(densities.items()):
        key = random.fold_in(rng_key, i)
        walk[name], states[name], said = config.walkers[name].prepare(key, density, prior[name])
        info |= {f"{name}/{k}": v for k, v in said.items()}
    walk = jax.tree.map(jax.lax.stop_gradient, walk)
    return walk, states, info


def advance_walkers(
    config: Config,
    rng_key: Array,
    densities: dict[str, TiltedDensity],
    following: dict[str, TiltedDensity],
    prior: dict[str, WalkerState],
    known: dict[str, tuple[Array, Array]],
) -> tuple[dict[str, WalkerState], dict[str, Array]]:
    """``advance`` of every energy prior's strategy."""
    states = {}
    info: dict[str, Array] = {}
    for i, (name, density) in enumerate(densities.items()):
        key = random.fold_in(rng_key, i)
        states[name], said = config.walkers[name].advance(key, density, following[name], prior[name], known.get(name))
        info |= {f"{name}/{k}": v for k, v in said.items()}
    return states, info


def energy_gap(walk: Walkers, tilted: TiltedDensity, position: Array, particles: Array) -> tuple[Array, Array]:
    """How far the mean energy of the walkers lies above that of the particles, and the walkers' deviation."""
    energy = jax.lax.stop_gradient(tilted.energy(position))
    mean = jnp.sum(walk.weight * energy, 0)
    variance = jnp.sum(walk.weight * jnp.square(energy - mean), 0)
    return jnp.mean(mean) - particles, jnp.sqrt(jnp.mean(variance))


def energy_brake(config: Config, info: dict[str, Array], gaps: dict[str, tuple[Array, Array]]) -> Array:
    """A factor from 0 to 1 on the energy's updates: small where its walkers cannot keep up.

    A strategy may say so itself (``site/brake``), or the gap in mean energy between walkers and particles: one that
    grows is how a fit runs away, as the energy falls where the particles are and no walker has been yet. Where the
    walkers' energy is the lower one they have found a hole that has to be filled, and nothing is held back.
    """
    brake = jnp.ones(())
    for name, strategy in config.walkers.items():
        if not strategy.brake_gap:
            continue
        gap, deviation = gaps[name]
        factor = jnp.minimum(1.0, (1 + deviation) / jnp.maximum(gap, 1e-6)) ** 2
        factor = factor * info.get(f"{name}/brake", 1.0)
        brake = jnp.minimum(brake, jnp.where(gap < 0, 1.0, factor))
    return brake


def braked(config: Config, updates: Params, brake: Array) -> Params:
    """``updates`` with those of the energy's parameters slowed down."""
    return {
        name: jax.tree.map(lambda u: brake.astype(u.dtype) * u, update) if name in config.energy_params else update
        for name, update in updates.items()
    }


def batch_indices(model: LatentModel, state: TrainState) -> Array | None:
    """The data that this step visits; None if it visits all."""
    if not model.subsampled:
        return None
    key = random.fold_in(state.rng_key, jnp.uint32(0xFFFFFFFF))
    return minibatch(key, state.step, model.num_data, model.batch_size)


def gather(state: TrainState, indices: Array | None) -> Block:
    """The minibatch's particles."""
    posterior = state.posterior
    momentum = posterior.momentum
    if momentum is not None:
        momentum = (take(momentum[0], indices, 1), momentum[1])
    return Block(take(posterior.local, indices, 1), posterior.glob, momentum)


def scatter(state: TrainState, indices: Array | None, block: Block, adapt: tuple) -> Any:
    """All particles, with the minibatch's put back."""
    posterior, momentum = state.posterior, block.momentum
    if momentum is not None:
        momentum = (put(posterior.momentum[0], indices, momentum[0], 1), momentum[1])
    local = put(posterior.local, indices, block.local, 1)
    return posterior._replace(
        local=local, glob=block.glob, momentum=momentum, adapt_local=adapt[0], adapt_global=adapt[1]
    )


def averaged(average: Params, params: Params, count: Array, power: float) -> Params:
    """Polynomial-decay average (Shamir and Zhang, 2013): of about the last ``1/(1 + power)`` of all steps.

    It needs no horizon, so a resumed run continues it; ``power = 0`` is the plain mean.
    """
    weight = (1 + power) / (1 + power + count)
    return jax.tree.map(lambda a, p: a + (weight * (p - a)).astype(a.dtype), average, params)


def step_sizes(block: Block, adapt: tuple[Adaptation, Adaptation]) -> dict[str, Array]:
    """Step sizes by block, for the history."""
    sizes = {}
    if block.local:
        sizes["step_size_local"] = jnp.exp(adapt[0].log_step)
    if block.glob:
        sizes["step_size_global"] = jnp.exp(adapt[1].log_step)
    return sizes
