"""The parameter move: any optax transformation or NumPyro optimiser, and what optax lacks.

The parameter noise of EBIPLA (2510.12311) and IPLA (2303.13429) is an optax transformation that takes its
key as an extra argument of ``update``, so that no hidden state decides a run:

>>> import jax.numpy as jnp, optax
>>> from jax import random
>>> from numpyro_ebipla.optim import langevin_noise
>>> optim = optax.chain(optax.sgd(1e-2), langevin_noise(1e-2))
>>> params = {"theta": jnp.zeros(3)}
>>> state = optim.init(params)
>>> updates, state = optim.update(params, state, params, rng_key=random.key(0), inverse_temperature=100)
>>> updates["theta"].shape
(3,)
"""

from numpyro_ebipla.optim.choose import as_optax, by_role, default_optimizer
from numpyro_ebipla.optim.default import reaching_adam
from numpyro_ebipla.optim.langevin import kinetic_langevin, langevin, langevin_noise
from numpyro_ebipla.optim.reach import with_reach
from numpyro_ebipla.optim.schedules import inverse_sqrt_decay
from numpyro_ebipla.optim.transforms import (
    in_single_precision,
    nesterov_mean,
    orthogonalise,
    orthogonalised,
    scale_by_capped_adam,
    scale_by_fan_in,
    scale_by_width,
)

__all__ = [
    "as_optax",
    "by_role",
    "default_optimizer",
    "in_single_precision",
    "inverse_sqrt_decay",
    "kinetic_langevin",
    "langevin",
    "langevin_noise",
    "nesterov_mean",
    "orthogonalise",
    "orthogonalised",
    "reaching_adam",
    "scale_by_capped_adam",
    "scale_by_fan_in",
    "scale_by_width",
    "with_reach",
]
