"""What a run returns: plain data, and views of it for ArviZ and the terminal."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpyro import handlers

from numpyro_ebipla._types import Params, TrainState


class Fit:
    """A fitted model.

    Attributes:
        params: constrained parameters, like SVI's.
        state: the last sound :class:`~numpyro_ebipla._types.TrainState`; ``run(init_state=fit.state)`` goes on.
        losses: contrast at each step, ``[K]``.
        history: ``{name: [K]}`` contrast, gradient norm, acceptance, step sizes; for each energy prior
            ``site/accept``, ``site/log_z`` and, by strategy, ``site/ess`` (as a fraction), ``site/swap``.
        model: the model with the fitted parameters put in.
        num_chains: particles.
        num_samples: draws of each.
        stopped: why the run ended early, or None.
    """

    sample_dims = ("chain", "draw")

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    @staticmethod
    def build(
        model: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        config: Any,
        params: Params,
        state: TrainState,
        history: dict[str, np.ndarray],
        draws: Any,
        plan: Any,
        stopped: str | None,
    ) -> "Fit":
        """Put together what :meth:`EBIPLA.run` has."""
        return Fit(
            model=handlers.substitute(model, data=params),
            _args=args,
            _kwargs=kwargs,
            config=config,
            params=params,
            state=state,
            history=history,
            losses=history["contrast"],
            draws=draws,
            plan=plan,
            stopped=stopped,
            num_chains=config.num_particles,
            num_samples=plan.num_samples,
            thinning=plan.thinning,
        )

    def get_samples(self, group_by_chain: bool = True) -> dict[str, np.ndarray]:
        """Particle posteriors in the constrained space.

        Args:
            group_by_chain: ``[particle, draw, ...]`` if true, else ``[particle · draw, ...]``.
        """
        samples = self.draws.samples if self.draws is not None else {}
        if group_by_chain:
            return dict(samples)
        return {k: v.reshape((-1, *v.shape[2:])) for k, v in samples.items()}
