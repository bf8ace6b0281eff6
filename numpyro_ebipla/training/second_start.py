"""A second start for parameters that ran to an edge of their space while the others were still far away.

A scale has no slope at zero, nor a probability at zero or one, in the unconstrained space in which steps are taken: a
parameter that has come to such an edge stays. Rightly so if the likelihood is highest there. But a half-normal
inefficiency, say, is driven to zero by residuals that a mean leaves which began far off (Waldman, 1982, has the
stationary point: it is a saddle where residuals are skewed as the model has it). So, once, when most fits are near
their end, such parameters begin where they began, with new particles, and the others where they are. What belongs at
the edge goes there again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.flatten_util import ravel_pytree

from numpyro_ebipla._core.state import Params, TrainState
from numpyro_ebipla.training.config import Config
from numpyro_ebipla.training.newton import flat, is_known, look_at

#: The step after which that is asked.
SECOND_START = 1000
#: How far a parameter must have gone from its start, in the unconstrained space, and slope and curvature of the log
#: likelihood below which the likelihood is level in it: factors of twenty, and nats to a factor of e.
AWAY, LEVEL = 3.0, 0.05


class SecondStart(NamedTuple):
    """What gives parameters a second start.

    Attributes:
        config: of the steps.
        first: where the parameters began, unconstrained.
        begin: ``(rng_key, params, mutable, data) -> state``, an initial state.
    """

    config: Config
    first: Params
    begin: Callable[..., TrainState]

    def consider(self, state: TrainState, data: Any) -> TrainState:
        """Return the state, or a new one where parameters lie at an edge."""
        at_edge = self._at_edge(state, data)
        if not np.any(at_edge):
            return state
        here, unflatten = ravel_pytree(state.params)
        params = unflatten(jnp.where(jnp.asarray(at_edge), ravel_pytree(self.first)[0], here))
        key = random.fold_in(state.rng_key, SECOND_START)
        new = self.begin(key, params, state.mutable, data)
        return new._replace(step=state.step, rng_key=state.rng_key)

    def _at_edge(self, state: TrainState, data: Any) -> np.ndarray:
        """Return which of the L numbers are constrained, far from their start, and level."""
        transforms = self.config.model.param_transforms
        constrained = jax.tree.map_with_path(lambda path, x: jnp.full(x.shape, path[0].key in transforms), state.params)
        far = flat(constrained).astype(bool) & (np.abs(flat(state.params) - flat(self.first)) > AWAY)
        if not far.any():
            return far
        slope, curvature = look_at(self.config.model, state, data)
        return far & (np.maximum(np.abs(slope), np.abs(np.diag(curvature))) < LEVEL)


def second_start_for(
    config: Config, params: Params, shapes: Callable[[], TrainState], begin: Callable[..., TrainState]
) -> SecondStart | None:
    """Return what gives parameters a second start, where slope and curvature are known (:func:`.is_known`).

    Args:
        config: of the steps.
        params: where they begin, unconstrained.
        shapes: of a state.
        begin: see :class:`SecondStart`.
    """
    return SecondStart(config, params, begin) if is_known(config, params, shapes) else None
