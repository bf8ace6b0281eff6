r"""Zero-variance control variates, as weights of the particles.

At the posterior ``p(x | y)`` gradients of its own log density have known means: ``E[∂_i log p] = 0`` and
``E[1 + (x_i − c) ∂_i log p] = 0`` for any ``c`` (integration by parts). What of a parameter's gradient is linear in
these is noise, and a regression takes it away (Assaraf and Caffarel, 1999; Mira, Solgi and Imparato, 2013, *Zero
variance MCMC for Bayesian estimators*). A regression's intercept is linear in what is regressed, so all that it takes
is a weight for each particle, the same for all parameters: no gradient by particle, whatever the network.

Where the posterior is normal and a parameter's gradient is quadratic without mixed terms, as of locations, scales and
variances, nothing of the noise is left. The density must be continuous in the latents: where it jumps, as that of
``Uniform(0, x)`` at an observation, gradients do not know the jump, and the weights would have a bias.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_ebipla._core.few import apply, cross, solver, weigh
from numpyro_ebipla._core.state import Latents, Sites
from numpyro_ebipla.smc.features import FOLDS, Fields, choose_fields

#: Of a feature's variance, added to it.
RIDGE = 1e-5
#: Where particles lag behind their posterior the regression extrapolates, and a correction is bounded where the mean
#: features are this many times as far from zero as four standard deviations of equilibrium.
FAR = 30.0
#: Elsewhere the bound is out of equilibrium's reach: of 400,000 folds of 14 normal particles one was at 915.
BEYOND = 1000.0
#: They lag, and are taken along, see :func:`recentring`, where the p-value of their mean slope says so: this times as
#: far as equilibrium is seldom, 1e-7 for one coordinate. In equilibrium no bound may act: that of features, which are
#: skewed, was met by one datum of 140 with 14 particles, and left a variance at zero 0.2 nats short.
BEHIND = 5.0


def fields_of(position: Sites, chain_ndim: int) -> Fields | None:
    """Return the fields that serve chains ``{site: [*C, *event]}``; None without sites, or with too few particles.

    Chains that belong to data have fields of their own for each datum; others may have groups that share some.
    """
    leaves = list(position.values())
    if not leaves:
        return None
    return choose_fields(len(leaves[0]), [x.shape[chain_ndim:] for x in leaves], shared=chain_ndim == 1)


def quiet_sites(latents: Latents) -> tuple[Sites, int]:
    """Return the latents whose control variates serve, and how many axes their chains have.

    Local latents alone have fields of each datum's own. Global ones couple all data, whose own latents then are groups
    like others, as far as there are particles for both.
    """
    if not latents.shared:
        return latents.local, 2
    both = latents.shared | latents.local
    return (both if fields_of(both, 1) else latents.shared), 1


def control_weights(position: Sites, gradient: Sites, chain_ndim: int, before: Array | None = None) -> Array:
    """Return weights ``[*C]`` that sum to one over the particles, the leading axis.

    Args:
        position: ``{site: [*C, *event]}``, of chains ``C`` that :func:`fields_of` serve.
        gradient: of the log density there, likewise.
        chain_ndim: one, or two where chains belong to data.
        before: ``[N]`` weights of the particles, by default equal ones.
    """
    x, slope = _flat(position, gradient, chain_ndim)
    weight = _equal(x) if before is None else before
    weight = jnp.broadcast_to(weight.reshape((-1,) + (1,) * (chain_ndim - 1)), x.shape[:chain_ndim])
    return reweighted(weight, x, slope, _known(fields_of(position, chain_ndim)))


def recentring(position: Sites, gradient: Sites, chain_ndim: int) -> tuple[Sites, Array]:
    """Return how far the particles' mean is from the posterior's, ``{site: [*data, *event]}``, and where that is far.

    By the same regression: gradients of a normal density are linear, whatever the particles' distance, so that its
    mean is known from any of them.

    Args:
        position: see :func:`control_weights`.
        gradient: likewise.
        chain_ndim: likewise.

    Returns:
        The shifts that would take the particles to the mean, and ``[*data]`` whether they are far behind.
    """
    x, slope = _flat(position, gradient, chain_ndim)
    fields = _known(fields_of(position, chain_ndim))

    def one(x: Array, slope: Array) -> tuple[Array, Array]:
        equal = _equal(x)
        change, behind = _towards_level(equal, fields.levels(equal, x, slope))
        return fields.shared(equal, x, weigh(change, x - x.mean(0, keepdims=True))), behind

    shift, far = one(x, slope) if chain_ndim == 1 else jax.vmap(one, 1)(x, slope)
    return _sites(shift, position, chain_ndim), far


def explained(
    position: Sites, gradient: Sites, values: Array, chain_ndim: int, weight: Array | None = None
) -> tuple[Sites, Array]:
    """Regress ``values`` ``[*C, L]`` on the control variates of each datum.

    What is explained of one is ``h · ∂ log p + div h``, of a field ``h`` linear in each coordinate.

    Args:
        position: see :func:`control_weights`.
        gradient: likewise.
        values: of each chain.
        chain_ndim: likewise.
        weight: ``[N]`` of the particles, by default equal ones.

    Returns:
        The fields ``{site: [L, *C, *event]}``, and the covariance ``[L, L]`` of what is left, summed over data.
    """
    x, slope = _flat(position, gradient, chain_ndim)
    fields = _known(fields_of(position, chain_ndim))

    weight = _equal(x) if weight is None else weight
    number = 1 / jnp.sum(jnp.square(weight))

    def one(x: Array, slope: Array, values: Array) -> tuple[Array, Array]:
        features = fields.features(weight, x, slope)
        features, values = (v - weigh(weight, v)[None] for v in (features, values))
        scale = jnp.sqrt(weigh(weight, jnp.square(features))) + jnp.finfo(x.dtype).tiny
        features = features / scale[None]
        weighted = weight[:, None] * features
        coefficient = jax.vmap(_solver(cross(weighted, features)), 1, 1)(cross(weighted, values))
        rest = values - features @ coefficient
        field = fields.field(weight, x, coefficient / scale[:, None])
        return field, cross(weight[:, None] * rest, rest) * (number / (number - fields.number - 1))

    if chain_ndim == 1:
        field, left = one(x, slope, values)
        return _sites(field, position, 1), left
    field, left = jax.vmap(one, 1, (2, 0))(x, slope, values)
    return _sites(field, position, 2), left.sum(0)


def _equal(x: Array) -> Array:
    """Return equal weights of particles ``[N, …]``."""
    return jnp.full(len(x), 1 / len(x), x.dtype)


def _flat(position: Sites, gradient: Sites, chain_ndim: int) -> tuple[Array, Array]:
    """Return both as ``[*C, d]``, with the sites in one order: JAX sorts the keys of what it differentiates."""
    flat = lambda sites: jnp.concatenate([sites[k].reshape((*sites[k].shape[:chain_ndim], -1)) for k in position], -1)
    return flat(position), flat(gradient)


def _sites(flat: Array, like: Sites, chain_ndim: int) -> Sites:
    """Return ``{site: […, *event]}`` from ``[…, d]``."""
    parts, start = {}, 0
    for name, value in like.items():
        event = value.shape[chain_ndim:]
        part = flat[..., start : start + math.prod(event)]
        parts[name], start = part.reshape((*part.shape[:-1], *event)), start + math.prod(event)
    return parts


def reweighted(weight: Array, x: Array, slope: Array, fields: Fields) -> Array:
    """Return weights ``[N]`` (``[N, D]``) by which the control variates of particles with ``weight`` have mean zero.

    Args:
        weight: sums to one over the leading axis.
        x: ``[N, d]`` (``[N, D, d]``) positions.
        slope: gradient of the log density there.
        fields: of the control variates.
    """
    if weight.ndim > 1:
        return jax.vmap(reweighted, (1, 1, 1, None), 1)(weight, x, slope, fields)
    corrections, ratio = _corrections(weight, x, slope, fields)
    behind = _towards_level(weight, fields.levels(weight, x, slope))[1]
    bound = ratio / jnp.where(behind, FAR, BEYOND)
    total = jnp.sum(corrections / jnp.maximum(bound, 1.0)[:, None], 0)
    return weight - jnp.where(jnp.isfinite(total).all(), total, 0.0)


def _towards_level(weight: Array, slope: Array) -> tuple[Array, Array]:
    """Return the change ``[N]`` of the weights by which the mean slope ``[N, d]`` is zero, and whether that is far.

    Of Hotelling's T² over N − 1, ``(N − d) log(1 + T²/(N − 1))`` is about minus twice the log p-value, however few the
    particles are.
    """
    size = slope.shape[-1]
    mean = weigh(weight, slope)
    centred = slope - mean[None]
    scale = jnp.sqrt(weigh(weight, jnp.square(centred))) + jnp.finfo(slope.dtype).tiny
    centred, mean = centred / scale[None], mean / scale
    coefficient = _solver(cross(weight[:, None] * centred, centred))(mean)
    freedom = jnp.maximum(1 / jnp.sum(jnp.square(weight)) - size, 1.0)
    distance = freedom * jnp.log1p(jnp.sum(mean * coefficient))
    return -weight * apply(centred, coefficient), distance > BEHIND * _usual(size)


def _solver(gram: Array) -> Callable[[Array], Array]:
    """Return :func:`.solver` with a ridge, and once more for what it leaves: only small directions stay out.

    Where a scale is near zero, complete-data information is millions of times the observed, and 1e-5 of it too much.
    """
    solve = solver(gram + RIDGE * jnp.eye(len(gram), dtype=gram.dtype))

    def twice(b: Array) -> Array:
        first = solve(b)
        return first + solve(b - apply(gram, first))

    return twice


def _known(fields: Fields | None) -> Fields:
    assert fields is not None, "a caller looks first whether any fields serve"
    return fields


def _usual(number: int) -> float:
    """Return the mean of χ² and four of its standard deviations: equilibrium is seldom as far."""
    return number + 4 * (2 * number) ** 0.5


def _corrections(weight: Array, x: Array, slope: Array, fields: Fields) -> tuple[Array, Array]:
    """Return what each fold takes from the weights ``[FOLDS, N]``, and its distance ``[FOLDS]`` over what is usual."""
    fold = jnp.arange(len(x)) % FOLDS
    inside = (fold[None] == jnp.arange(FOLDS)[:, None]).astype(x.dtype)  # [FOLDS, N]

    def correction(inside: Array) -> tuple[Array, Array]:
        share = jnp.sum(inside * weight)
        mine, others = inside * weight / share, (1 - inside) * weight / (1 - share)
        features = fields.features(others, x, slope)
        centred = features - weigh(others, features)[None]
        scale = jnp.sqrt(weigh(others, jnp.square(centred))) + jnp.finfo(x.dtype).tiny
        centred, mean = centred / scale[None], weigh(mine, features) / scale
        coefficient = _solver(cross(others[:, None] * centred, centred))(mean)
        distance = jnp.sum(mean * coefficient) / jnp.sum(jnp.square(mine))
        return share * others * apply(centred, coefficient), distance / _usual(fields.number)

    return jax.vmap(correction)(inside)
