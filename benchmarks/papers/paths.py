"""A run step by step: what ``fit.history`` does not keep, such as the parameters' path."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from numpyro_ebipla import EBIPLA


class Walk:
    """``init`` and ``num_steps`` times ``update`` of a system, compiled once for arguments of the same shapes.

    Args:
        system: an :class:`~numpyro_ebipla.EBIPLA`.
        num_steps: K.
        watch: ``state -> pytree`` to record after every step; the unconstrained parameters by default.
    """

    def __init__(self, system: EBIPLA, num_steps: int, watch: Callable | None = None) -> None:
        self.system = system
        self.watch = watch or (lambda state: state.params)

        @jax.jit
        def steps(state: Any, args: tuple) -> tuple[Any, Any]:
            def body(state: Any, _: None) -> tuple[Any, Any]:
                state, _ = system.update(state, *args)
                return state, self.watch(state)

            return lax.scan(body, state, None, num_steps)

        self._steps = steps

    def __call__(self, rng_key: Any, *args: Any, init_params: Any = None) -> tuple[Any, Any]:
        """The last state and ``watch`` at every step, the start included: ``[K + 1, ...]``."""
        first = self.system.init(rng_key, *args, init_params=init_params)
        last, seen = self._steps(first, args)
        path = jax.tree.map(lambda a, b: np.concatenate([np.asarray(a)[None], np.asarray(b)]), self.watch(first), seen)
        return last, path
