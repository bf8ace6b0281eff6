"""A model compiled for arguments of given shapes."""

from collections.abc import Callable
from typing import NamedTuple

from numpyro_ebipla._core.state import TrainState
from numpyro_ebipla.model.inspection import Inspection
from numpyro_ebipla.training.config import Config


class System(NamedTuple):
    """A model with one choice per column of the table of systems, for arguments of given shapes."""

    config: Config
    inspection: Inspection
    run_chunk: Callable
    update: Callable
    start: Callable
    shapes: Callable[[], TrainState]
