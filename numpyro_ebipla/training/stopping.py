"""When is a run over? When the parameters' path no longer goes anywhere.

Every 25 steps the parameters of each site are looked at along a few fixed directions. The looks of the last half of
the run are cut into four quarters, and split R-hat compares the quarters' means with the spread inside them, pooled
over the directions of a site. A path with a trend gives about 4.6 however slow it is, and a random walk about 2.2; a
path that fluctuates about one point gives 1. The contrast of the same steps, or any entry of the history, is judged
likewise.

>>> import numpy as np
>>> noise = np.random.default_rng(0).normal(size=(100, 3))
>>> round(split_r_hat(noise), 1), round(split_r_hat(noise + np.arange(100)[:, None]), 1)
(1.0, 4.4)
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from numpyro_ebipla._core.state import Params


class Limits(NamedTuple):
    """When a run ends before its last step.

    Attributes:
        deadline: on the clock of :func:`time.monotonic`.
        r_hat: see :mod:`numpyro_ebipla.training.stopping`, or None.
        gain: see :func:`.watch_for`.
    """

    deadline: float = np.inf
    r_hat: float | dict[str, float] | None = None
    gain: float | bool = False


NO_LIMITS = Limits()


def parse_limits(max_time: Any, stop_at_r_hat: Any, stop_at_gain: Any = False) -> Limits:
    """Return the limits from now on that the arguments of ``run`` ask for.

    Raises:
        ValueError: naming the argument that is off.
    """
    numbers = {"max_time": (max_time, 0), "stop_at_r_hat": (stop_at_r_hat, 1)}
    if not isinstance(stop_at_gain, bool | np.bool_):
        numbers["stop_at_gain"] = (np.nan if stop_at_gain is None else stop_at_gain, 0)
    if isinstance(stop_at_r_hat, dict):
        numbers |= {f"stop_at_r_hat[{name!r}]": (value, 1) for name, value in stop_at_r_hat.items()}
        del numbers["stop_at_r_hat"]
    for name, (value, least) in numbers.items():
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not (number and value > least) and (value is not None or "[" in name):
            raise ValueError(f"{name} must be a number above {least}, got {value!r}.")
    return Limits(np.inf if max_time is None else time.monotonic() + max_time, stop_at_r_hat, stop_at_gain)


#: Steps between two looks at the parameters.
PROBE_EVERY = 25
#: Steps before the first verdict.
JUDGE_FROM = 1000
#: Directions in which a site with more parameters than this is looked at.
DIRECTIONS = 16


@jax.jit
def probe(params: Params) -> dict[str, Array]:
    """Return ``{site: [r]}``: parameters themselves where they are few, else sums with fixed random signs."""
    return {name: _directions(random.key(i), params[name]) for i, name in enumerate(sorted(params))}


def _directions(key: Array, value: Params) -> Array:
    flat = jnp.concatenate([jnp.ravel(leaf).astype(float) for leaf in jax.tree.leaves(value)] or [jnp.zeros(0)])
    if flat.size <= DIRECTIONS:
        return flat
    project = lambda k: jnp.sum(random.rademacher(k, flat.shape, flat.dtype) * flat)
    return lax.map(project, random.split(key, DIRECTIONS))  # one after the other: memory stays that of the parameters


def split_r_hat(path: np.ndarray) -> float:
    """Return split R-hat of four quarters of a path ``[n, r]``, pooled over r; NaN if it is not finite throughout.

    A path that does not move at all (or has no directions) has 1.
    """
    length = len(path) // 4
    path = np.asarray(path[len(path) - 4 * length :], np.float64)
    if not length or not np.isfinite(path).all():
        return float("nan")
    quarters = path.reshape(4, length, -1)
    within = quarters.var(1, ddof=1).sum(-1).mean()
    between = quarters.mean(1).var(0, ddof=1).sum()
    if within == between == 0:
        return 1.0
    with np.errstate(divide="ignore"):
        return float(np.sqrt((length - 1) / length + between / within))


def is_judged(done: int) -> bool:
    """Return whether there is a verdict after so many steps: from 1000 on, at numbers of two significant digits.

    >>> [k for k in range(20_000) if is_judged(k)][:2], [k for k in range(20_000) if is_judged(k)][-2:]
    ([1000, 1100], [18000, 19000])
    """
    return done >= JUDGE_FROM and done % 10 ** (len(str(done)) - 2) == 0


def thresholds(wanted: float | dict[str, float] | None, sites: list[str], names: list[str]) -> dict[str, float]:
    """Return ``{name: threshold}`` of all that has to settle; empty if nothing is to stop a run.

    Args:
        wanted: one threshold for all parameter sites and the contrast, or ``{name: threshold}``.
        sites: of the parameters.
        names: in the history.

    Raises:
        ValueError: naming what is neither a site nor an entry of the history.

    >>> thresholds(1.1, ["mean"], ["contrast", "grad_norm"])
    {'mean': 1.1, 'contrast': 1.1}
    """
    if not isinstance(wanted, dict):
        return {} if wanted is None else dict.fromkeys([*sites, "contrast"], wanted)
    unknown = [name for name in wanted if name not in sites and name not in names]
    if unknown:
        raise ValueError(f"stop_at_r_hat: no {unknown}; there are parameters {sites} and in the history {names}.")
    return dict(wanted)


def run_r_hat(
    wanted: dict[str, float], probes: dict[str, np.ndarray], history: dict[str, np.ndarray]
) -> dict[str, float]:
    """Return split R-hat over the last half of a run, of each name wanted.

    Args:
        wanted: ``{name: threshold}``.
        probes: ``{site: [looks, r]}`` from the start on; NaN where nobody looked.
        history: ``{name: [steps]}``.

    Returns:
        ``{name: R-hat}``; NaN without looks at all of the last half.
    """
    paths = {name: probes[name] if name in probes else history[name][:, None] for name in wanted}
    return {name: split_r_hat(path[len(path) // 2 :]) for name, path in paths.items()}
