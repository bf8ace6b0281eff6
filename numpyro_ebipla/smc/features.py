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
from collections.abc import Sequence
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
#: Particles to a feature where groups share some. The coordinates of other sites then keep their own as far as there
#: are so many: of 60 groups beside 120 that share theirs these would be 126 features, too many for 256.
PARTICLES_PER_SHARED_FIELD = 10
#: Of a column's mean square, added where a shift is smoothed: groups that are all alike have columns of zeros.
SMOOTHING_RIDGE = 1e-4


class Own(NamedTuple):
    """Coordinates that each have fields of their own.

    Attributes:
        width: how many coordinates there are.
    """

    width: int

    @property
    def numbers(self) -> tuple[int, int]:
        """How many features there are of constant fields, and of linear ones."""
        return self.width, self.width

    def at(self, weight: Array, x: Array) -> "_OwnAt":
        """Return these fields at particles ``[N, width]``, centred by their weight ``[N]``."""
        return _OwnAt(x - weigh(weight, x)[None])


class Shared(NamedTuple):
    """Groups that share fields.

    Attributes:
        groups: G.
        size: coordinates of one group, e.
    """

    groups: int
    size: int

    @property
    def width(self) -> int:
        """How many coordinates there are."""
        return self.groups * self.size

    @property
    def numbers(self) -> tuple[int, int]:
        """How many features there are of constant fields, and of linear ones."""
        return 2 * self.size * (1 + self.size), 2 * self.size**2

    def at(self, weight: Array, x: Array) -> "_SharedAt":
        """Return these fields at particles ``[N, width]``, centred by their weight ``[N]``."""
        x = x.reshape(-1, *self)
        centre = jnp.einsum("n,nge->ge", weight, x)
        away = x - centre[None]
        cov = jnp.einsum("n,ngi,ngj->gij", weight, away, away)
        return _SharedAt(away, cov, jnp.concatenate([jnp.ones((self.groups, 1), x.dtype), _standard(centre)], -1))


class Fields(NamedTuple):
    """The fields in use, for ``d`` coordinates.

    Attributes:
        parts: of the coordinates, in order.
        steep: whether linear fields serve besides constant ones.
    """

    parts: tuple[Own | Shared, ...]
    steep: bool = True

    @property
    def numbers(self) -> list[int]:
        """How many features there are of the constant fields of each part, and then of the linear ones."""
        level, steep = zip(*(part.numbers for part in self.parts), strict=True)
        return [*level, *steep] if self.steep else [*level]

    @property
    def number(self) -> int:
        """How many features there are."""
        return sum(self.numbers)

    def features(self, weight: Array, x: Array, slope: Array) -> Array:
        """Return the features ``[N, number]`` of particles ``[N, d]`` with the slopes of their log density.

        Args:
            weight: ``[N]`` of the particles from which centres (and covariances) are taken.
            x: the particles.
            slope: there.
        """
        parts = list(zip(self._at(weight, x), self._split(slope), strict=True))
        level = [part.levels(slope) for part, slope in parts]
        return jnp.concatenate(level + [part.steeps(slope) for part, slope in parts] if self.steep else level, -1)

    def levels(self, weight: Array, x: Array, slope: Array) -> Array:
        """Return those of constant fields alone, ``[N, l]``."""
        return self._replace(steep=False).features(weight, x, slope)

    def shared(self, weight: Array, x: Array, shift: Array) -> Array:
        """Return the part of a shift ``[d]`` that groups have in common, as far as they share anything."""
        parts = zip(self._at(weight, x), self._split(shift[None]), strict=True)
        return jnp.concatenate([part.smooth(shift[0]) for part, shift in parts])

    def field(self, weight: Array, x: Array, coefficient: Array) -> Array:
        """Return ``Σ_f coefficient_f h_f(x)`` of ``[number, L]``, ``[L, N, d]``."""
        by_part = iter(jnp.split(coefficient, np.cumsum(self.numbers)[:-1]))
        parts = self._at(weight, x)
        fields = [part.level(next(by_part)) for part in parts]
        if self.steep:
            fields = [field + part.steep(next(by_part)) for field, part in zip(fields, parts, strict=True)]
        return jnp.concatenate(fields, -1)

    def _at(self, weight: Array, x: Array) -> "list[_OwnAt | _SharedAt]":
        return [part.at(weight, own) for part, own in zip(self.parts, self._split(x), strict=True)]

    def _split(self, flat: Array) -> list[Array]:
        """Return the columns of each part of ``[n, d]``."""
        return jnp.split(flat, np.cumsum([part.width for part in self.parts])[:-1], 1)


class _OwnAt(NamedTuple):
    """Fields of coordinates of their own, at particles whose distance from the centre is ``away`` ``[N, d]``."""

    away: Array

    def levels(self, slope: Array) -> Array:
        return slope

    def steeps(self, slope: Array) -> Array:
        return 1 + self.away * slope

    def level(self, coefficient: Array) -> Array:
        return jnp.broadcast_to(coefficient.T[:, None], (coefficient.shape[1], *self.away.shape))

    def steep(self, coefficient: Array) -> Array:
        return coefficient.T[:, None] * self.away

    def smooth(self, shift: Array) -> Array:
        return shift


class _SharedAt(NamedTuple):
    """Fields that groups share, at their particles.

    Attributes:
        away: ``[N, G, e]``, the particles' distance from the centre.
        cov: ``[G, e, e]``.
        basis: ``[G, 1 + e]``: one, and the centres, as far as they differ.
    """

    away: Array
    cov: Array
    basis: Array

    def levels(self, slope: Array) -> Array:
        """Return the features of constant fields, from slopes ``[N, G e]``."""
        return jnp.einsum("gb,ngk->nbk", self.basis, self._both(slope)).reshape(len(slope), -1)

    def steeps(self, slope: Array) -> Array:
        """Return those of linear fields."""
        number, size = self.cov.shape[:2]
        divergence = jnp.concatenate([number * jnp.eye(size, dtype=self.cov.dtype), self.cov.sum(0)], -1)
        return (jnp.einsum("ngi,ngk->nik", self.away, self._both(slope)) + divergence).reshape(len(slope), -1)

    def level(self, coefficient: Array) -> Array:
        """Return the constant part of :meth:`Fields.field` for these groups, ``[L, N, G e]``."""
        size, outputs = self.cov.shape[-1], coefficient.shape[-1]
        field = self._turned(jnp.einsum("gb,bkl->lgk", self.basis, coefficient.reshape(1 + size, 2 * size, outputs)))
        return jnp.broadcast_to(field.reshape(outputs, 1, -1), (outputs, len(self.away), field[0].size))

    def steep(self, coefficient: Array) -> Array:
        """Return the linear part."""
        size, outputs = self.cov.shape[-1], coefficient.shape[-1]
        both = jnp.einsum("ngi,ikl->lngk", self.away, coefficient.reshape(size, 2 * size, outputs))
        return self._turned(both).reshape(outputs, len(self.away), -1)

    def smooth(self, shift: Array) -> Array:
        """Return the regression of a shift ``[G e]`` on the centres and variances."""
        variances = _standard(jnp.diagonal(self.cov, axis1=1, axis2=2))
        columns = jnp.concatenate([self.basis, variances], -1)
        ridge = SMOOTHING_RIDGE * len(columns) * jnp.eye(columns.shape[1], dtype=columns.dtype)
        shift = shift.reshape(len(columns), -1)
        return (columns @ jax.vmap(solver(cross(columns, columns) + ridge), 1, 1)(cross(columns, shift))).ravel()

    def _turned(self, both: Array) -> Array:
        """Return ``[…, G, e]`` of ``[…, G, 2 e]``: the one half, and the covariance times the other."""
        size = self.cov.shape[-1]
        return both[..., :size] + jnp.einsum("gij,...gi->...gj", self.cov, both[..., size:])

    def _both(self, slope: Array) -> Array:
        """Return ``[N, G, 2 e]``: the slopes, and the covariance times the slopes."""
        slope = slope.reshape(-1, *self.away.shape[1:])
        return jnp.concatenate([slope, jnp.einsum("gij,ngj->ngi", self.cov, slope)], -1)


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
        Two fields to a coordinate, or one; or those that the groups of all sites share, or only of the widest, where
        there are particles in plenty; or None, if there are more than N can bear.

    >>> choose_fields(64, [(8, 2)], shared=True)
    Fields(parts=(Own(width=16),), steep=True)
    >>> choose_fields(256, [(2,), (72, 2)], shared=True)
    Fields(parts=(Own(width=2), Shared(groups=72, size=2)), steep=True)
    """
    others = num_particles - -(-num_particles // FOLDS)
    most = min(num_particles // PARTICLES_PER_FEATURE, others - SPARE_PARTICLES)
    widths = [math.prod(shape) for shape in shapes]
    if not sum(widths):
        return None
    for own in (Fields((Own(sum(widths)),)), Fields((Own(sum(widths)),), steep=False)):
        if own.number <= most:
            return own
    parts: list[Own | Shared] = [Own(width) for width in widths]
    for i in sorted(range(len(shapes)), key=lambda i: -widths[i]) if shared else ():
        parts[i] = Shared(*as_groups(shapes[i]))
        if Fields(tuple(parts)).number * PARTICLES_PER_SHARED_FIELD <= num_particles:
            break
    fields = Fields(tuple(parts))
    return fields if shared and fields.number <= most else None
