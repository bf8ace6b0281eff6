"""Data of another run than the state's, refused by name: the particles belong to the data."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array, random

from numpyro_ebipla._core.errors import ModelError
from numpyro_ebipla._core.static import is_traced
from numpyro_ebipla._core.tree import spaced

#: Values of each array that are compared.
COMPARED = 1000
#: Mean squared change, over the variance of the values, from which data are other data. Two draws of one law have two;
#: noise that is added anew at each step has less.
OTHER = 0.1


class SeenData:
    """What the runs that began here had for data: some values of each, by the state's key.

    A state from elsewhere is taken to have the data with which it is first seen.
    """

    def __init__(self) -> None:
        self.values: dict[bytes, list[dict[int, np.ndarray]]] = {}
        self.latest: tuple = ()

    def remember(self, state_key: Array, arrays: tuple, num_data: int) -> None:
        """Take these for the data of a run."""
        self.values.setdefault(_text(state_key), []).append(_look(arrays, num_data))
        self.latest = arrays

    def check(
        self, state_key: Array, arrays: tuple, num_data: int, argument: str, names: Callable[[], dict[str, Any]]
    ) -> None:
        """Raise for other data than those of the state's run.

        Args:
            state_key: of the state.
            arrays: the model's array arguments.
            num_data: M.
            argument: by which the state was given.
            names: returns the model's arguments by their names.

        Raises:
            ModelError: naming the argument of the model.
        """
        if is_traced(state_key, arrays):
            return
        same = len(arrays) == len(self.latest) and all(a is b for a, b in zip(arrays, self.latest, strict=True))
        if same and sum(map(len, self.values.values())) == 1:  # a loop over update need not wait for its state
            return
        known = self.values.get(_text(state_key))
        if known is None:
            return self.remember(state_key, arrays, num_data)
        now = _look(arrays, num_data)
        others = [[i for i in before if i in now and _differ(before[i], now[i])] for before in known]
        if all(others):  # runs on several data may have had one key
            for i in others[-1]:
                found = [n for n, value in names().items() if any(x is arrays[i] for x in jax.tree.leaves(value))]
                raise ModelError(
                    f"argument '{''.join(found[:1])}' of the model holds other data than the run of this {argument}, "
                    "whose particles belong to them. Pass all data at once (numpyro.plate(…, subsample_size=…) draws "
                    "the minibatches), or start afresh with init_params=fit.params."
                )


def _text(key: Array) -> bytes:
    return np.asarray(random.key_data(key)).tobytes()


def _look(arrays: tuple, num_data: int) -> dict[int, np.ndarray]:
    """Return some values of the arrays that have an axis of the data; others may change from step to step."""
    found = {}
    for i, x in enumerate(arrays):
        if num_data > 1 and num_data in np.shape(x):
            some = np.unravel_index(spaced(np.size(x), COMPARED), np.shape(x))
            found[i] = np.asarray(x[some]).astype(np.float64)
    return found


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    both = np.isfinite(a) & np.isfinite(b) if a.shape == b.shape else np.zeros(())
    return bool(np.any(both)) and bool(np.mean(np.square(a - b)[both]) > OTHER * np.var(a[both]))
