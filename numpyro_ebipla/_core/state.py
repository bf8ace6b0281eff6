"""Plain-data state of the algorithm.

Letters, as everywhere in the package: ``M`` data, ``B`` minibatch size, ``N`` particles per datum,
``P`` prior walkers. ``C`` stands for the shape of a family of chains: ``(N, B)`` for the particles of
local latents, ``(N,)`` for those of global ones, ``(P,)`` for the walkers of an unconditional prior and
``(P, B)`` for those of a prior that is conditional on covariates.

What is carried from step to step (and therefore what a checkpoint holds) is a :class:`TrainState`;
what a step merely reports is an ``info`` dictionary of scalars.
"""

from typing import Any, NamedTuple

from jax import Array

from numpyro_ebipla._core.tree import PyTree

#: ``{site: array [*C, *event]}``, always in unconstrained space.
Sites = dict[str, Array]
#: ``{site: value}``; values are arrays or pytrees of arrays, as at ``numpyro.param`` sites.
Params = dict[str, Any]


class Latents(NamedTuple):
    """Latents in their two blocks, which are moved one after the other; either may be empty.

    Attributes:
        local: ``{site: [N, M, *event]}`` (``[N, B, *event]`` of a minibatch) inside the data plate.
        shared: ``{site: [N, *event]}`` outside it, shared by all data.
    """

    local: Sites
    shared: Sites

    def replaced(self, sites: Sites) -> "Latents":
        """Return the same with other values of some sites."""
        return Latents(*({name: sites.get(name, x) for name, x in block.items()} for block in self))


class DatumSteps(NamedTuple):
    """Step sizes of the chains of each datum, over the one that all share.

    Attributes:
        log_step: ``[M]``, zero for the shared step size itself.
        count: ``[M]`` number of adaptations so far.
    """

    log_step: Array
    count: Array  # type: ignore[assignment]


class Adaptation(NamedTuple):
    """What a kernel learns about a family of chains.

    Attributes:
        log_step: log of the step size, a scalar.
        curvature: like an event, running mean of the squared gradient, the diagonal of the Fisher information of the
            target; its inverse is the proposal's covariance. None if unused.
        count: number of adaptations so far.
        by_datum: for chains that belong to data, or None.
        coupling: ``[D/m, m, m]`` lower Cholesky factors of the curvature's correlations, by blocks of m of all
            coordinates in order; None if unused.
    """

    log_step: Array
    curvature: PyTree | None
    count: Array  # type: ignore[assignment]
    by_datum: DatumSteps | None = None
    coupling: Array | None = None


class PosteriorState(NamedTuple):
    """Posterior particles of all data.

    Attributes:
        local: ``{site: [N, M, *event]}`` latents inside the data plate.
        shared: ``{site: [N, *event]}`` latents outside it.
        momentum: momenta of underdamped kernels, like the latents, else ``None``.
        adapt_local, adapt_shared: the kernels' adaptation.
        memory: what else a way to keep particles carries, chains ``C`` leading, such as weights; or ``None``.
    """

    local: Sites
    shared: Sites
    momentum: Latents | None
    adapt_local: Adaptation
    adapt_shared: Adaptation
    memory: Any = None

    @property
    def latents(self) -> Latents:
        """The particles."""
        return Latents(self.local, self.shared)


class TrainState(NamedTuple):
    """Everything that a resumed run needs.

    Attributes:
        step: number of steps taken, int32.
        rng_key: the state's own key, split off the run's; step ``k`` uses ``fold_in(rng_key, k)``, minibatches and
            later estimates keys of their own tags.
        params: unconstrained parameters.
        average: running average of ``params`` over about the last of the steps, see ``averaging``.
        slow_average: the same over about their last third; where both are the same, the parameters have settled.
        optim_state: state of the optax transformation.
        mutable: values at ``mutable`` sites (batch statistics and the like), ``{}`` if there are none.
        posterior: the particles.
        prior: ``{site: state}`` of each energy prior's walkers, of a type of their strategy's own.
    """

    step: Array
    rng_key: Array
    params: Params
    average: Params
    slow_average: Params
    optim_state: Any
    mutable: dict[str, Any]
    posterior: PosteriorState
    prior: dict[str, Any]
