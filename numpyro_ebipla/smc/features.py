r"""What has mean zero at a density: ``h · ∂ log p + div h``, of fields ``h`` of the coordinates.

Two kinds of fields serve. **Each coordinate has its own**, a constant and one that is linear in it: two features to a
coordinate. Hundreds of groups, each with latents of its own, have more coordinates than particles. Then **the groups
share theirs**: with ``c_g`` the mean and ``V_g`` the covariance of the latents of group g over the particles, fields

    ``a``, ``V_g a``, ``c_g a``, ``c_g V_g a``, ``A (x_g − c_g)``, ``V_g A (x_g − c_g)``

are added up over groups, where ``a`` and ``A`` run over unit vectors and matrices. That is enough where posteriors are
normal, groups are independent given the parameters and a parameter acts through the latents' own design, as in
mixed models with random intercepts and slopes: the coefficients that take away all noise are linear in ``V_g`` and
``c_g``, however large groups are. Elsewhere the features have mean zero as well, and take less away.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_ebipla._core.few import as_groups, cross, solver, weigh

#: Parts of the particles: each gets its coefficients from the others, so that the weighted mean has no bias.
FOLDS = 4
#: Particles to a feature, at least, for coefficients that add less noise than they take away; and how many must be left
#: beyond the features among those that a fold's coefficients come from: with fewer the noise has heavy tails.
PARTICLES_PER_FEATURE, SPARE_PARTICLES = 2, 8
#: Of a column's mean square, added where a shift is smoothed: groups that are all alike have columns of zeros.
SMOOTHING_RIDGE = 1e-4


class Fields(NamedTuple):
    """The fields in use, for ``d`` coordinates.

    Attributes:
        number: of features.
        groups: ``(G, e)`` of each site whose ``G`` groups share fields of ``e`` coordinates, one after the other; empty
            where each coordinate has its own.
    """

    number: int
    groups: tuple[tuple[int, int], ...] = ()

    def features(self, weight: Array, x: Array, slope: Array) -> Array:
        """Return the features ``[N, number]`` of particles ``[N, d]`` with the slopes of their log density.

        Args:
            weight: ``[N]`` of the particles from which centres (and covariances) are taken.
            x: the particles.
            slope: there.
        """
        if not self.groups:
            return jnp.concatenate([slope, 1 + (x - weigh(weight, x)[None]) * slope], -1)[:, : self.number]
        parts = []
        for group, own in self._with_own(weight, x, slope):
            parts += [group.levels(own), group.steeps(own)]
        return jnp.concatenate(parts, -1)

    def levels(self, weight: Array, x: Array, slope: Array) -> Array:
        """Return those of constant fields alone, ``[N, l]``."""
        if not self.groups:
            return slope
        return jnp.concatenate([group.levels(own) for group, own in self._with_own(weight, x, slope)], -1)

    def shared(self, weight: Array, x: Array, shift: Array) -> Array:
        """Return the part of a shift ``[d]`` that groups have in common, as far as they share anything."""
        if not self.groups:
            return shift
        return jnp.concatenate([group.smooth(own[0]).ravel() for group, own in self._with_own(weight, x, shift[None])])

    def field(self, weight: Array, x: Array, coefficient: Array) -> Array:
        """Return ``Σ_f coefficient_f h_f(x)`` of ``[number, L]``, ``[L, N, d]``."""
        size, outputs = x.shape[-1], coefficient.shape[-1]
        if not self.groups:
            level, steep = coefficient[:size], coefficient[size:]
            field = jnp.broadcast_to(level.T[:, None], (outputs, *x.shape))
            return field + steep.T[:, None] * (x - weigh(weight, x)[None]) if len(steep) else field
        ends = np.cumsum([sum(_numbers(e)) for _, e in self.groups])[:-1]
        own = zip(self._with_own(weight, x, x), jnp.split(coefficient, ends), strict=True)
        parts = [group.field(part).reshape(outputs, len(x), -1) for (group, _), part in own]
        return jnp.concatenate(parts, -1)

    def _with_own(self, weight: Array, x: Array, flat: Array) -> "Iterator[tuple[_Groups, Array]]":
        """Yield the groups of each site, with their part ``[n, G, e]`` of ``[n, d]``."""
        ends = np.cumsum([number * size for number, size in self.groups])[:-1]
        parts = zip(self.groups, jnp.split(x, ends, 1), jnp.split(flat, ends, 1), strict=True)
        for shape, positions, own in parts:
            yield _group(weight, positions.reshape(-1, *shape)), own.reshape(-1, *shape)


class _Groups(NamedTuple):
    """The groups of one site.

    Attributes:
        away: ``[N, G, e]``, the particles' distance from the centre.
        cov: ``[G, e, e]``.
        basis: ``[G, 1 + e]``: one, and the centres, as far as they differ.
    """

    away: Array
    cov: Array
    basis: Array

    def levels(self, slope: Array) -> Array:
        """Return the features of constant fields, from slopes ``[N, G, e]``."""
        return jnp.einsum("gb,ngk->nbk", self.basis, self._both(slope)).reshape(len(slope), -1)

    def steeps(self, slope: Array) -> Array:
        """Return those of linear fields."""
        number, size = self.cov.shape[:2]
        divergence = jnp.concatenate([number * jnp.eye(size, dtype=self.cov.dtype), self.cov.sum(0)], -1)
        return (jnp.einsum("ngi,ngk->nik", self.away, self._both(slope)) + divergence).reshape(len(slope), -1)

    def field(self, coefficient: Array) -> Array:
        """Return :meth:`Fields.field` of these groups, ``[L, N, G, e]``."""
        size, outputs = self.cov.shape[-1], coefficient.shape[-1]
        level, steep = jnp.split(coefficient, [_numbers(size)[0]])
        both = jnp.einsum("gb,bkl->lgk", self.basis, level.reshape(1 + size, 2 * size, outputs))[:, None]
        both = both + jnp.einsum("ngi,ikl->lngk", self.away, steep.reshape(size, 2 * size, outputs))
        return both[..., :size] + jnp.einsum("gij,lngi->lngj", self.cov, both[..., size:])

    def smooth(self, shift: Array) -> Array:
        """Return the regression of a shift ``[G, e]`` on the centres and variances."""
        variances = _standard(jnp.diagonal(self.cov, axis1=1, axis2=2))
        columns = jnp.concatenate([self.basis, variances], -1)
        ridge = SMOOTHING_RIDGE * len(columns) * jnp.eye(columns.shape[1], dtype=columns.dtype)
        return columns @ jax.vmap(solver(cross(columns, columns) + ridge), 1, 1)(cross(columns, shift))

    def _both(self, slope: Array) -> Array:
        """Return ``[N, G, 2 e]``: the slopes, and the covariance times the slopes."""
        return jnp.concatenate([slope, jnp.einsum("gij,ngj->ngi", self.cov, slope)], -1)


def _numbers(size: int) -> tuple[int, int]:
    """Return how many features of constant and of linear fields groups of ``size`` coordinates share."""
    return 2 * size * (1 + size), 2 * size * size


def _group(weight: Array, x: Array) -> _Groups:
    centre = jnp.einsum("n,nge->ge", weight, x)
    away = x - centre[None]
    cov = jnp.einsum("n,ngi,ngj->gij", weight, away, away)
    return _Groups(away, cov, jnp.concatenate([jnp.ones((len(centre), 1), x.dtype), _standard(centre)], -1))


def _standard(columns: Array) -> Array:
    """Return columns ``[G, e]`` of mean zero and mean square one, or zero."""
    columns = columns - columns.mean(0)
    return columns / (jnp.sqrt(jnp.mean(jnp.square(columns), 0)) + jnp.finfo(columns.dtype).tiny)


def choose_fields(num_particles: int, shapes: Sequence[tuple[int, ...]], shared: bool = False) -> Fields | None:
    """Return the fields that serve N particles of sites of these shapes, as many as there are particles for.

    Args:
        num_particles: N.
        shapes: of the sites of one particle.
        shared: whether the leading axis of a shape may be one of groups that share fields.

    Returns:
        Two fields to a coordinate, or one, or those that groups share; or None, if there are more than N can bear.

    >>> choose_fields(64, [(8, 2)], shared=True)
    Fields(number=32, groups=())
    >>> choose_fields(256, [(72, 2)], shared=True)
    Fields(number=20, groups=((72, 2),))
    """
    others = num_particles - -(-num_particles // FOLDS)
    most = min(num_particles // PARTICLES_PER_FEATURE, others - SPARE_PARTICLES)
    size = sum(math.prod(shape) for shape in shapes)
    number = next((n * size for n in (2, 1) if 0 < n * size <= most), 0)
    if number or not shared or not size:
        return Fields(number) if number else None
    groups = tuple(as_groups(shape) for shape in shapes)
    number = sum(sum(_numbers(e)) for _, e in groups)
    return Fields(number, groups) if number <= most else None
