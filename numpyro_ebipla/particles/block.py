"""Blocks of particles: their chains, their log densities, and what is known where they stand."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from numpyro_ebipla._core.state import Adaptation, Latents, PosteriorState
from numpyro_ebipla._core.tree import take
from numpyro_ebipla.kernels.base import Evaluation

Info = dict[str, Array]


class Terms(NamedTuple):
    """Log densities of N particles.

    Attributes:
        per_datum: ``[N, B]`` of what lies inside the data plate, by datum.
        rest: ``[N]`` of all else.
    """

    per_datum: Array
    rest: Array


#: Log joint density of the particles of a minibatch.
LogJoint = Callable[[Latents], Terms]
#: Fresh particles from the prior, by a key.
Draw = Callable[[Array], Latents]


class Known(NamedTuple):
    """What is known where particles stand.

    Attributes:
        local: each datum's by itself, ``[N, B]``, given the shared latents.
        shared: of the whole, ``[N]``, a minibatch standing for all data.
    """

    local: Evaluation
    shared: Evaluation


class Adaptations(NamedTuple):
    """The kernel's adaptation to the local block and to the shared one."""

    local: Adaptation
    shared: Adaptation


class Block(NamedTuple):
    """Chains of the current minibatch.

    Attributes:
        latents: where they stand.
        momentum: likewise, of underdamped kernels, else None.
        memory: see :class:`~numpyro_ebipla._core.state.PosteriorState`.
    """

    latents: Latents
    momentum: Latents | None = None
    memory: Any = None


class Prepared(NamedTuple):
    """What enters the gradient.

    Attributes:
        block: the particles.
        adapt: of the local and the shared block.
        weight: ``[N, B]`` (``[N]`` if there are shared latents), sums to one over N; None for ``1/N``.
        known: log densities and gradients there, if ``prepare`` had to compute them (without normalisers of
            energy priors); None leaves them to the step's own backward pass.
        info: what to report.
    """

    block: Block
    adapt: Adaptations
    weight: Array | None = None
    known: Known | None = None
    info: Info = {}

    @property
    def num_particles(self) -> int:
        """N, one without latents."""
        chains = jax.tree.leaves(self.block.latents)
        return chains[0].shape[0] if chains else 1


def gather(posterior: PosteriorState, indices: Array | None) -> tuple[Block, Adaptations]:
    """Return the particles of some data, None for all, and the kernels' adaptation to them."""
    momentum, memory = posterior.momentum, posterior.memory
    if momentum is not None:
        momentum = Latents(take(momentum.local, indices, 1), momentum.shared)
    if not posterior.shared:  # then all memory is by datum
        memory = take(memory, indices, 1)
    adapt = posterior.adapt_local._replace(by_datum=take(posterior.adapt_local.by_datum, indices, 0))
    latents = Latents(take(posterior.local, indices, 1), posterior.shared)
    return Block(latents, momentum, memory), Adaptations(adapt, posterior.adapt_shared)
