"""A run step by step: what ``fit.history`` does not keep, such as the parameters' path."""

import warnings
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
        watch: ``(state, extra) -> pytree`` to record; the unconstrained parameters by default.
        every: steps between two records; it divides K.
    """

    def __init__(self, system: EBIPLA, num_steps: int, watch: Callable | None = None, every: int = 1) -> None:
        self.system, self.num_steps = system, num_steps // every * every
        self.watch = jax.jit(watch or (lambda state, extra: state.params))

        @jax.jit
        def steps(state: Any, args: tuple, extra: Any) -> tuple[Any, Any]:
            def body(state: Any, _: None) -> tuple[Any, Any]:
                state = lax.fori_loop(0, every, lambda _, state: system.update(state, *args)[0], state)
                return state, self.watch(state, extra)

            return lax.scan(body, state, None, num_steps // every)

        self._steps = steps

    def __call__(self, rng_key: Any, *args: Any, extra: Any = None, **start: Any) -> tuple[Any, Any]:
        """The last state and the records, that of the start included: ``[K / every + 1, ...]``.

        Args:
            rng_key: PRNG key.
            *args: of the model.
            extra: for ``watch``.
            **start: of ``init``.
        """
        return self.from_state(self.system.init(rng_key, *args, **start), *args, extra=extra)

    def from_state(self, first: Any, *args: Any, extra: Any = None) -> tuple[Any, Any]:
        """As a call, from a given state."""
        last, seen = self._steps(first, args, extra)
        if int(last.step) < int(first.step) + self.num_steps:  # ``update`` takes no step that would not be finite
            warnings.warn(f"the run stood still after step {int(last.step)}: it diverged", stacklevel=2)
        join = lambda a, b: np.concatenate([np.asarray(a)[None], np.asarray(b)])
        return last, jax.tree.map(join, self.watch(first, extra), seen)
