"""How many particles a datum has, where the user does not say."""

import math
from typing import Any

import jax
import numpy as np
from jax import random

from numpyro_ebipla._core.state import Params
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.inspection import Inspection, count_operations
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.smc.features import PARTICLES_PER_SHARED_FIELD, Fields, Own, Shared, choose_fields
from numpyro_ebipla.training.information import by_coordinate

#: Chains of posterior particles that a step moves, about: enough to keep two cores busy.
CHAINS = 2000
#: Least and largest number of particles that follows from it.
FEWEST_PARTICLES, MOST_PARTICLES = 4, 64
#: Operations that the log density of a step's chains may take. Beyond, it is steps that fits lack, not particles: on
#: 28×28 images of MNIST under transposed convolutions, 1.2e8 operations for each particle of a minibatch, one particle
#: has a Fréchet distance of 4.1 after a minute, two have 6.1, four 13.8. On digits of 16×16, 2e7 each, one, three and
#: eleven particles have 1.5, 1.4 and 1.8 after half a minute.
OPERATIONS = 2.2e8
#: Particles of global latents: this many for each coordinate, so that their gradients are quiet, and no more than that.
PARTICLES_PER_COORDINATE, MOST_SHARED_PARTICLES = 4, 256
#: Local latents have as many as make the gradients of up to 32 parameters quiet, where particles times numbers of data
#: are no more than this: a step then takes a millisecond or two.
QUIET_ELEMENTS = 200_000


def choose_num_particles(inspection: Inspection) -> int:
    """Return how many particles make a step worth its while, and the gradients of global latents quiet."""
    model = inspection.model
    chains = model.batch_size if model.local_sites else 1
    number = int(np.clip(-(-CHAINS // chains), FEWEST_PARTICLES, MOST_PARTICLES))
    few_params = by_coordinate(inspection.params)
    if model.independent_data and not few_params:
        number = max(1, min(number, int(OPERATIONS / max(1.0, count_operations(inspection)))))
    if model.subsampled or not model.latents:
        return number
    params, batch = inspection.params, Batch(None, inspection.data, random.key(0), inspection.mutable)
    local, shared = jax.eval_shape(lambda: model.draw_latents(model.constrain_params(params), batch))
    if model.global_sites:
        shapes = [x.shape for x in shared.values()]
        fields = choose_fields(MOST_SHARED_PARTICLES, shapes, shared=True)
        wanted = PARTICLES_PER_COORDINATE * sum(math.prod(shape) for shape in shapes)
        if fields and any(isinstance(part, Shared) for part in fields.parts) and _in_plates(model, params, batch):
            wanted = PARTICLES_PER_SHARED_FIELD * fields.number
        return max(number, min(wanted, MOST_SHARED_PARTICLES))
    size = sum(math.prod(x.shape) for x in local.values()) // model.num_data
    full = Fields((Own(size),))
    quiet = next((n for n in range(number, MOST_PARTICLES) if choose_fields(n, [(size,)]) == full), number)
    elements = sum(np.size(x) for x in jax.tree.leaves(inspection.data))
    few = few_params and not model.energies and quiet * max(elements, model.num_data) <= QUIET_ELEMENTS
    return quiet if few else number


def _in_plates(model: LatentModel, params: Params, batch: Batch) -> bool:
    """Return whether all global latents are groups of plates, which may share what a process or a network does not."""
    stacks: list[Any] = []

    def look() -> None:
        sites = model.sites(model.constrain_params(params), batch)
        stacks.extend(sites[name]["cond_indep_stack"] for name in model.global_sites)

    jax.eval_shape(look)
    return all(stacks)
