"""Moves of posterior particles while the parameters are held."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_ebipla._core.state import Latents, Params
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.particles.base import AbstractParticles
from numpyro_ebipla.particles.block import Adaptations, Block, Info, Terms
from numpyro_ebipla.particles.moves import Points, evaluate_at, move_points, points_of, refresh
from numpyro_ebipla.training.safeguards import recall


class Held(NamedTuple):
    """What the particles of one block of data move by, and at which parameters (constrained)."""

    particles: AbstractParticles
    model: LatentModel
    params: Params
    batch: Batch

    def log_joint(self, latents: Latents) -> Terms:
        """Return the log densities of the particles."""
        joint = self.model.log_joint(self.params, *latents, self.batch, {})
        return Terms(joint.per_datum, joint.rest)

    def start(self, chains: Block, warming: bool) -> Points:
        """Return the particles with what is known where they stand; before a warm-up lost ones are called back."""
        known = evaluate_at(self.log_joint, 1.0, chains.latents)
        if warming and self.particles.recalls:
            chains, known, _ = recall(chains, known, jnp.ones((), bool))
        return points_of(chains, known)

    def move(
        self, rng_key: Array, points: Points, adapt: Adaptations, adapting: Array
    ) -> tuple[Points, Adaptations, Info]:
        """Make one move, from which the kernel learns where ``adapting`` is true."""
        kernel = self.particles.kernel
        points, learned, info = move_points(kernel, 1, rng_key, self.log_joint, 1.0, points, adapt)
        return refresh(self.log_joint, 1.0, points), jax.tree.map(partial(jnp.where, adapting), learned, adapt), info
