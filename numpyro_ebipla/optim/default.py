"""The default optimiser: Adam for parameters of any scale, and orthogonal moves for the matrices of networks."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.tree_util import all_leaves

from numpyro_ebipla.optim.reach import GAIN, MOST, root_mean_square, with_reach
from numpyro_ebipla.optim.schedules import inverse_sqrt_decay
from numpyro_ebipla.optim.transforms import (
    fan_in_factor,
    in_single_precision,
    nesterov_mean,
    orthogonalise,
    scale_by_capped_adam,
    scale_by_fan_in,
    scale_by_width,
)

#: Adam's usual first rate, tenfold: the reach takes it back where that is too much, and rates fall from it.
RATE = 1e-2
#: Decay of the mean gradient of matrices, as of Muon (Jordan et al., 2024): their direction needs a longer memory, as
#: equal singular values raise the noise in the small ones.
MATRIX_DECAY = 0.95
#: Far below any gradient that matters: that of a location is the smaller the larger the unit's numbers are.
EPS = 1e-16
#: For an energy's parameters: a constant in the energy has no gradient but rounding, 1e-7 in single precision, and must
#: not drift by it.
ENERGY_EPS = 1e-5
#: For an energy's parameters, whose gradients are differences of two noisy means, and for the matrices of all networks,
#: where noise prevails as well, see :func:`with_reach`.
NETWORK_SLACK = 2.0
#: For the same reason: steps up to the parameters' own size are enough where nothing has a unit.
NETWORK_MOST = 1.0
#: Gradients are cut here, as squares of single precision end at 3e38. Particles drawn from the prior may lie where the
#: likelihood is exp(-1e20): what noise in proportion to a prediction near zero makes of a datum.
LARGEST = 1e15
#: Steps in which the rate of other networks rises to its own, where there is an energy. A decoder that is the faster of
#: the two folds the latent space before the energy has learnt where the data are.
WARMUP = 1000


def reaching_adam(
    learning_rate: optax.ScalarOrSchedule, gain: float = GAIN, orthogonal: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Return Adam for parameters of any scale, however far they have to go.

    Three things differ from Adam (Kingma and Ba, 2015): large gradients of the start are forgotten
    (:func:`~numpyro_ebipla.optim.transforms.scale_by_capped_adam`), steps grow where gradients keep their direction
    (:func:`~numpyro_ebipla.optim.reach.with_reach`), and those of wide networks' weights are the smaller the more
    inputs a unit has (:func:`~numpyro_ebipla.optim.transforms.scale_by_fan_in`). With ``orthogonal``, for the weights
    of a network, the move of a matrix is its mean gradient with all singular values made equal (Muon; Jordan et al.,
    2024): directions in which gradients are small move as fast as the others. An energy learns fine detail so in a
    fraction of the steps.

    Args:
        learning_rate: step size, or a schedule of it.
        gain: how fast the factors of the steps change.
        orthogonal: whether matrices move so.
    """
    if not orthogonal:
        return _at_rate(learning_rate, _adam_moves(gain))
    return _at_rate(learning_rate, _network_moves(gain, _adam_moves(gain, ENERGY_EPS, NETWORK_SLACK, NETWORK_MOST)))


def default_for(role: str, with_energy: bool) -> optax.GradientTransformationExtraArgs:
    """Return the default optimiser of the parameters ``{site: tree}`` of a role.

    Args:
        role: ``"energy"`` or ``"rest"``.
        with_energy: whether there are any of the former.
    """
    rate = inverse_sqrt_decay(RATE)
    if role == "energy":
        return reaching_adam(rate, orthogonal=True)
    late = (lambda step: jnp.minimum(step / WARMUP, 1.0) * rate(step)) if with_energy else rate
    parts = {
        "network": _at_rate(late, _network_moves(GAIN, _adam_moves(GAIN))),
        "module": reaching_adam(rate),
        "numbers": _at_rate(rate, _adam_moves(GAIN, by_number=True)),
    }
    return optax.partition(parts, lambda params: {name: _kind(tree) for name, tree in params.items()})


def _kind(site: Any) -> str:
    """Return what a site is: a number or an array of them, a network of several matrices, or another module."""
    if all_leaves([site]):
        return "numbers"
    return "network" if sum(leaf.ndim == 2 for leaf in jax.tree.leaves(site)) > 1 else "module"


def _at_rate(
    learning_rate: optax.ScalarOrSchedule, moves: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    return in_single_precision(optax.chain(optax.clip(LARGEST), moves, optax.scale_by_learning_rate(learning_rate)))


def _network_moves(gain: float, other: optax.GradientTransformation) -> optax.GradientTransformation:
    kinds = lambda params: jax.tree.map(lambda p: "matrix" if p.ndim == 2 else "other", params)
    return optax.partition({"matrix": _matrix_moves(gain), "other": other}, kinds)


def _adam_moves(
    gain: float, eps: float = EPS, slack: float = 1.0, most: float = MOST, by_number: bool = False
) -> optax.GradientTransformation:
    inner = optax.chain(scale_by_capped_adam(eps=eps), scale_by_fan_in())
    size = lambda weights: root_mean_square(weights) / fan_in_factor(weights)
    mean_of = lambda state: state[0].mean
    return with_reach(inner, mean_of=mean_of, gain=gain, slack=slack, most=most, size=size, by_number=by_number)


def _matrix_moves(gain: float) -> optax.GradientTransformation:
    def size(matrix: Array) -> Array:
        # The entries of an update have root mean square 1/√m, see scale_by_width.
        return root_mean_square(matrix) * jnp.sqrt(matrix.shape[0])

    inner = optax.chain(nesterov_mean(MATRIX_DECAY), orthogonalise(), scale_by_width())
    mean_of = lambda state: state[0].mean
    return with_reach(
        inner, MATRIX_DECAY, mean_of=mean_of, gain=gain, slack=NETWORK_SLACK, most=NETWORK_MOST, size=size
    )
