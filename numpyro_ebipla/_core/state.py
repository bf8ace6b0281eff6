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

#: ``{site: array [*C, *event]}``, always in unconstrained space.
Latents = dict[str, Array]
#: ``{site: value}``; values are arrays or pytrees of arrays, as at ``numpyro.param`` sites.
Params = dict[str, Any]


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
        curvature: ``{site: [*event]}`` running mean of the squared gradient, the diagonal of the Fisher
            information of the target; its inverse is the proposal's covariance. Empty if unused.
        count: number of adaptations so far.
        by_datum: for chains that belong to data, or None.
        coupling: ``[D, D]`` lower Cholesky factor of the curvature's correlations, over the coordinates of all sites;
            None if unused.
    """

    log_step: Array
    curvature: Latents
    count: Array  # type: ignore[assignment]
    by_datum: DatumSteps | None = None
    coupling: Array | None = None


class PosteriorState(NamedTuple):
    """Posterior particles of all data.

    Attributes:
        local: ``{site: [N, M, *event]}`` latents inside the data plate.
        glob: ``{site: [N, *event]}`` latents outside it.
        momentum: ``(local, glob)`` momenta of underdamped kernels, else ``None``.
        adapt_local, adapt_global: the kernels' adaptation.
        memory: what else a way to keep particles carries, chains ``C`` leading, such as weights; or ``None``.
    """

    local: Latents
    glob: Latents
    momentum: tuple[Latents, Latents] | None
    adapt_local: Adaptation
    adapt_global: Adaptation
    memory: Any = None


class WalkerState(NamedTuple):
    """Prior walkers of one energy prior.

    Attributes:
        position: ``[P, *event]``, or ``[P, M, *event]`` if the prior is conditional on covariates.
        log_weight: ``[P]`` (or ``[P, M]``) unnormalised log weights, zero if the walkers are unweighted.
        log_density: log density of each walker when it was last moved (for delayed weights), or ``None``.
        momentum: like ``position``, for underdamped kernels, else ``None``.
        log_z: log normaliser relative to the base distribution at the last reset of the weights.
        adapt: the kernel's adaptation.
    """

    position: Array | None
    log_weight: Array | None
    log_density: Array | None
    momentum: Array | None
    log_z: Array
    adapt: Any


class TrainState(NamedTuple):
    """Everything that a resumed run needs.

    Attributes:
        step: number of steps taken, int32.
        rng_key: the run's key; step ``k`` uses ``fold_in(rng_key, k)`` and nothing else.
        params: unconstrained parameters.
        average: running average of ``params`` over about the last of the steps, see ``averaging``.
        slow_average: the same over about their last third; where both are the same, the parameters have settled.
        optim_state: state of the optax transformation.
        mutable: values at ``mutable`` sites (batch statistics and the like), ``{}`` if there are none.
        posterior: the particles.
        prior: ``{site: WalkerState}`` for each energy prior.
    """

    step: Array
    rng_key: Array
    params: Params
    average: Params
    slow_average: Params
    optim_state: Any
    mutable: dict[str, Any]
    posterior: PosteriorState
    prior: dict[str, WalkerState]
