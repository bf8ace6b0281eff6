"""How a population is annealed: one set of options for all who do."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from numpyro_ebipla._core.validate import check_counts, check_number, check_share

#: Step sizes are kept at this many temperatures, equally spaced.
NUM_KNOTS = 16
#: Step size before any adaptation, in units of the population's variance.
FIRST_STEP = 0.3


@dataclass(frozen=True)
class Annealing:
    """Options of :func:`.anneal`, which takes a population from a base density to a tilted one.

    The defaults suit posteriors, which :meth:`.EBIPLA.infer`, ``log_likelihood`` and ``reconstruct`` anneal to.

    Args:
        num_moves: MALA moves at each temperature.
        stage_ess: effective sample size, as a fraction of the population, that one stage's reweighting may cost a
            population of equal weights. Nearer to one: more temperatures.
        max_temps: largest number of temperatures. The second half of the ladder is stretched so as to end within it.
            The weights stay right, but where that costs far more than ``stage_ess`` their variance is not known.
        threshold: resample when the ESS falls below this fraction of the population.
        step_size: of the moves, in units of the population's variance; adapted on the way if None.
        rate: of that adaptation.

    Raises:
        ValueError: naming the option that is off.

    >>> Annealing(max_temps=500)
    Annealing(num_moves=5, stage_ess=0.9, max_temps=500, threshold=0.5, step_size=None, rate=0.2)
    """

    num_moves: int = 5
    stage_ess: float = 0.9
    max_temps: int = 200
    threshold: float = 0.5
    step_size: float | None = None
    rate: float = 0.2

    def __post_init__(self) -> None:
        check_counts(self, "num_moves", "max_temps")
        check_number(self, "stage_ess", below=1.0)
        check_share(self, "threshold")
        check_number(self, "rate")
        if self.step_size is not None:
            check_number(self, "step_size")

    def initial_log_step(self, dtype: jnp.dtype) -> Array:
        """Return ``[NUM_KNOTS]`` log step sizes to start with."""
        first = FIRST_STEP if self.step_size is None else self.step_size
        return jnp.full((NUM_KNOTS,), jnp.log(first), dtype)


#: Small stages and many moves: for draws and normalisers that must be right rather than fast.
FINE = Annealing(num_moves=40, stage_ess=0.98)
#: At every step of a fit: its walkers need not be independent of the last step's, and few temperatures must do.
EVERY_STEP = Annealing(num_moves=1, stage_ess=0.8, max_temps=50, rate=0.1)
#: Once, to find step sizes to start with: they move fast, and what the walkers become does not matter.
TO_LEARN_STEPS = Annealing(stage_ess=0.5, max_temps=100, rate=0.3)
