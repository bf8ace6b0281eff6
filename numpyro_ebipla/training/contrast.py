r"""The contrast, whose gradient is that of the log marginal likelihood.

    contrast = (1/B) Σ_m Σ_n w_{n,m} φ_m(θ, X^{n,m}) − Σ_p w_p U_α(X̄^p),        φ_m = −log p_β(y_m | x) + U_α(x)

Its gradient in θ is Fisher's identity (2510.12311, eq. 6), those in X and X̄ are Langevin drifts; one backward pass
gives all of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_ebipla._core.state import Latents, Params
from numpyro_ebipla.kernels.base import Evaluation
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.particles.block import Known, Prepared
from numpyro_ebipla.training.config import Config
from numpyro_ebipla.training.safeguards import Gap, hole_penalty, measure_gap, restrain
from numpyro_ebipla.walkers.base import Walkers


class Contrast(NamedTuple):
    """The value that θ descends, and everything that its backward pass knows.

    Attributes:
        value: the contrast.
        params_grad: its gradient.
        particles: log densities and gradients at the particles.
        walkers: ``{site: …}`` the same of the walkers that share the backward pass.
        energy: ``{site: energies of its walkers}``.
        log_density: ``{site: mean log density of its walkers}``.
        log_z: ``{site: what stood for log Z}``.
        coefficient: ``{site: derivative of the contrast in that}``.
        gap: ``{site: Gap}``.
        mutable: new values at ``mutable`` sites.
    """

    value: Array
    params_grad: Params
    particles: Known
    walkers: dict[str, Evaluation]
    energy: dict[str, Array]
    log_density: dict[str, Array]
    log_z: dict[str, Array]
    coefficient: dict[str, Array]
    gap: dict[str, Gap]
    mutable: dict[str, Any]


def contrast(
    config: Config,
    params: Params,
    ready: Prepared,
    walk: dict[str, Walkers],
    particles: dict[str, Array],
    batch: Batch,
) -> Contrast:
    """Return the contrast and its gradients.

    Args:
        config: whose strategies say which walkers' gradients are wanted, and what holds their energy back.
        params: unconstrained.
        ready: the particles.
        walk: the walkers.
        particles: some positions ``[n, *event]`` at the sites where :func:`.hole_penalty` applies.
        batch: what the model sees.
    """
    model = config.model
    N, B, M = ready.num_particles, model.batch_size, model.num_data
    restraints = restrain(config, walk)

    def loss(params: Params, latents: Latents, moving: dict, shift: dict) -> tuple[Array, Any]:
        params, positions = model.constrain_params(params), held | moving
        priors = model.energy_priors(params, batch)
        tilted = {name: prior.tilted() for name, prior in priors.items()}
        energy = {name: tilted[name].energy(positions[name]) for name in walk}
        log_density = {name: tilted[name].log_base(positions[name]) - energy[name] for name in walk}
        # ∇ log Z = −E[∇U]: this stands for log Z wherever the model's log density needs it.
        log_z = {
            name: (walk[name].mean(log_density[name]) + shift[name]).reshape(priors[name].batch_shape) for name in walk
        }
        joint = model.log_joint(params, *latents, batch, log_z)
        gap = {name: measure_gap(walk[name].weight, -log_density[name], joint.potentials[name]) for name in walk}
        value = -(average(joint.per_datum, ready.weight).mean() + average(joint.rest, ready.weight) / M)
        penalties = [restraint.penalty(tilted[name]) for name, restraint in restraints.items()]
        for name, x in particles.items():
            density, x, log_base = tilted[name], jax.lax.stop_gradient(x), log_density[name] + energy[name]
            # It is the energy's penalty: the base is left alone.
            here = density.energy(x) - jax.lax.stop_gradient(density.log_base(x))
            there = energy[name] - jax.lax.stop_gradient(log_base)
            penalties.append(hole_penalty(gap[name], here, walk[name].weight, there))
        return value + sum(penalties), (value, joint, energy, log_density, log_z, gap)

    sharing = {name for name, strategy in config.walkers.items() if strategy.shares_gradient}
    positions = {name: w.position for name, w in walk.items()}
    held = {name: jax.lax.stop_gradient(x) for name, x in positions.items() if name not in sharing}
    moving = {name: positions[name] for name in sharing}
    shift = {name: jnp.zeros(w.weight.shape[1:], w.weight.dtype) for name, w in walk.items()}

    backward = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    (_, aux), grads = backward(params, ready.block.latents, moving, shift)
    value, joint, energy, log_density, log_z, gap = aux
    params_grad, latents, walkers, coefficient = grads

    def undo_weight(name: str) -> Evaluation:
        scale = coefficient[name] * walk[name].weight
        scale = scale.reshape(scale.shape + (1,) * (walkers[name].ndim - scale.ndim))
        return Evaluation(log_density[name], walkers[name] / scale)

    known = ready.known
    if known is None:  # from derivatives of a mean back to those of each chain's own log density
        whole = M / B * joint.per_datum.sum(-1) + joint.rest
        of_chains = lambda tree, size: jax.tree.map(lambda g: -size * g, tree)
        known = Known(
            local=Evaluation(joint.per_datum, of_chains(latents.local, N * B)),
            shared=Evaluation(whole, of_chains(latents.shared, N * M)),
        )
    return Contrast(
        value=value,
        params_grad=params_grad,
        particles=known,
        walkers={name: undo_weight(name) for name in sharing},
        energy=energy,
        log_density={name: w.mean(log_density[name]) for name, w in walk.items()},
        log_z=log_z,
        coefficient=coefficient,
        gap=gap,
        mutable=joint.mutable,
    )


def average(values: Array, weight: Array | None) -> Array:
    """Average over the particles, the leading axis; weights by datum (``[N, B]``) do not apply to what has no datum."""
    if weight is None or weight.ndim > values.ndim:
        return values.mean(0)
    return jnp.sum(weight.reshape(weight.shape + (1,) * (values.ndim - weight.ndim)) * values, 0)


def cross_entropy(model: LatentModel, now: Contrast, info: dict[str, Array]) -> dict[str, Array]:
    """Report ``−mean log p(y)`` of a model without latents, where the walkers know log Z; else nothing."""
    log_z = {name: info[f"{name}/log_z"] for name in model.energies if f"{name}/log_z" in info}
    if model.latents or not log_z or len(log_z) < len(model.energies):
        return {}
    # The contrast has the walkers' mean log density where log Z belongs.
    shift: Any = sum(jnp.sum(now.coefficient[name] * (log_z[name] - now.log_density[name])) for name in model.energies)
    return {"cross_entropy": now.value + shift}
