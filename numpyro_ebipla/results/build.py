"""The end of a run: draws at the parameters that it reports, and the fit."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array, random

from numpyro_ebipla._core.errors import warn
from numpyro_ebipla._core.state import TrainState
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.values import SiteLayout
from numpyro_ebipla.results.drawing import progress_of
from numpyro_ebipla.results.fit import Fit
from numpyro_ebipla.results.visiting import on_collected
from numpyro_ebipla.system import System
from numpyro_ebipla.training.collect import Plan, collect, with_sites

#: Of the chains' moves in the steps the draws of minibatches' data may take this share, which is about a third of the
#: time: a step does more than move chains.
SHARE = 1 / 2
#: They may cost this many multiplications in any case, some seconds, if a move takes about as many as parameters and
#: some more.
CHEAP, OVERHEAD = 20_000_000_000, 100


def moves_to_spend(system: System, num_steps: int) -> int:
    """Return how many moves of chains the draws after a run may cost."""
    config = system.config
    steps = num_steps * config.model.batch_size * config.num_particles * config.particles.num_moves
    size = sum(np.size(x) for x in jax.tree.leaves(system.inspection.params))
    return int(max(SHARE * steps, CHEAP // (size + OVERHEAD)))


class Collection:
    """What is to be drawn, checked before the long work, and the fit that comes of it.

    Args:
        system: of the run.
        plan: how many draws, and what of.
        sites: see :meth:`.EBIPLA.run`.
        indices: likewise.
        data: the model's array arguments.

    Raises:
        ModelError: naming a site or datum that there is not, or draws that are too large.
    """

    plan: Plan
    layout: dict[str, SiteLayout]

    def __init__(self, system: System, plan: Plan, sites: Sequence[str] | None, indices: Any, data: Any) -> None:
        self.system, self.data = system, data
        at = (system.inspection.params, Batch(None, data, random.key(0), system.inspection.mutable))
        self.plan, self.layout = with_sites(plan, sites, indices, system.config, *at)

    def finish(
        self,
        rng_key: Array,
        state: TrainState,
        history: dict[str, np.ndarray],
        stopped: str | None,
        progress_bar: bool,
        model: Callable,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Fit:
        """Collect the draws, and return them with the record of the run.

        Args:
            rng_key: of the draws.
            state: the last sound one.
            history: ``{name: [steps]}``.
            stopped: why the run ended early, or None.
            progress_bar: whether to show one.
            model: of the user.
            args: of the model.
            kwargs: of the model.
        """
        config, draws = self.system.config, None
        estimate = config.estimate(state)
        with progress_of("collect", progress_bar) as progress:
            try:
                if config.model.latents and self.plan.num_samples:
                    particles, at = config.particles, (estimate, state, self.data)
                    draws = collect(config.model, particles, self.plan, self.layout, *at, rng_key, progress)
            except KeyboardInterrupt:
                stopped = "interrupted while collecting draws: fit.collect() collects them"
                warn(stopped)
        params = config.model.all_params(estimate)
        record = (params, state, history, stopped, model, args, kwargs, draws, self.plan, self.layout, config)
        return on_collected(Fit(*record))
