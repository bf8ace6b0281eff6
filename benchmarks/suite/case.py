"""What a case is: a model as a user would write it, and the truth about it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

Params = dict[str, Any]

#: Data whose posteriors are compared, at most.
COMPARED = 100


class Rival(NamedTuple):
    """The model that SVI fits in place of the case's, its guide (None: ``AutoNormal``) and the truth about it."""

    model: Callable
    guide: Callable | None
    value: Callable[[Params], float]


class Case(NamedTuple):
    """A fit whose outcome can be judged exactly.

    Attributes:
        name: on the command line and in the table.
        model: a NumPyro model.
        args: of the model; the data are arrays of float32.
        kwargs: likewise.
        site: the latent whose posterior is compared.
        num_data: elements of the data plate, the "data" of "nats per datum".
        value: exact mean log marginal likelihood of a datum at given parameters, in float64; of mixed models in total.
        optimum: its maximum; for latent energies, that of the true density on the same held-out data.
        posterior: ``(params, indices) -> (means, sds)``, exact, with the latent's shape after the data's axis.
        best: parameters at the optimum, where it has any.
        threshold: nats above the optimum that a fit may be, per datum as ``value`` or in total.
        rival: what SVI fits, if not the model itself.
        extremes: data whose posteriors are compared whatever else is: those that a fit gets wrong first.
        extra: more about a fit, for the record: ``params -> {name: number}``.
        off: largest distance of a parameter from the optimum in standard errors, where that is to be small too.
    """

    name: str
    model: Callable
    args: tuple
    site: str
    num_data: int
    value: Callable[[Params], float]
    optimum: float
    posterior: Callable[[Params, np.ndarray], tuple[np.ndarray, np.ndarray]]
    best: Params | None = None
    kwargs: dict[str, Any] = {}
    threshold: float = 0.01
    rival: Rival | None = None
    extremes: tuple[int, ...] = ()
    extra: Callable[[Params], dict[str, float]] | None = None
    off: Callable[[Params], float] | None = None

    def compared(self) -> np.ndarray:
        """The data whose posteriors are compared: evenly spaced ones, and the extremes."""
        num = min(COMPARED - len(self.extremes), self.num_data)
        even = np.linspace(0, self.num_data - 1, num).astype(int)
        return np.unique([*even, *self.extremes])


def double(params: Params) -> Params:
    """Parameters in float64, whatever their nesting."""
    if isinstance(params, dict):
        return {name: double(value) for name, value in params.items()}
    return np.asarray(params, np.float64)


def maximise(value: Callable[[Params], float], start: Params, positive: tuple[str, ...] = ()) -> Params:
    """The maximum over scalar parameters, from a start near it; its value is right to far below 1e-9."""
    names = list(start)

    def read(v: np.ndarray) -> Params:
        return {k: np.exp(x) if k in positive else x for k, x in zip(names, v, strict=True)}

    first = [np.log(start[k]) if k in positive else start[k] for k in names]
    found = optimize.minimize(lambda v: -value(read(v)), first, method="BFGS", jac="3-point", options={"gtol": 1e-8})
    return read(found.x)
