"""Schedules that optax lacks."""

import jax.numpy as jnp
import optax

#: Steps until the value has fallen by √2; after three times as many it has halved. In about that time a fit finds its
#: place, and what remains is to average the noise of its gradients away.
DECAY_STEPS = 1000


def inverse_sqrt_decay(init_value: float, decay_steps: float = DECAY_STEPS) -> optax.Schedule:
    """Return the schedule ``init_value / √(1 + k / decay_steps)`` of the step ``k``.

    Its sum diverges, so that any distance is covered in the end, and no horizon enters, so that a run can be continued
    at any time. It falls too slowly for the last iterate to converge: average the path (Polyak and Juditsky, 1992).

    Args:
        init_value: value at ``k = 0``.
        decay_steps: steps until it has fallen by √2.
    """
    return lambda step: init_value / jnp.sqrt(1 + step / decay_steps)
