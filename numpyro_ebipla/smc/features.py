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
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from numpyro_ebipla._core.few import as_groups, weigh

#: Parts of the particles: each gets its coefficients from the others, so that the weighted mean has no bias.
FOLDS = 4
#: Particles to a feature, at least, for coefficients that add less noise than they take away; and how many must be left
#: beyond the features among those that a fold's coefficients come from: with fewer the noise has heavy tails.
PARTICLES_PER_FEATURE, SPARE_PARTICLES = 2, 8


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
        for group in self._each(weight, x):
            both = group.both(group.of(slope))
            parts += [jnp.einsum("gb,ngk->nbk", group.basis, both)]
            parts += [jnp.einsum("ngi,ngk->nik", group.away, both) + group.divergence]
        return jnp.concatenate([part.reshape(len(x), -1) for part in parts], -1)

    def levels(self, weight: Array, x: Array, slope: Array) -> Array:
        """Return those of constant fields alone, ``[N, l]``."""
        if not self.groups:
            return slope
        each = self._each(weight, x)
        parts = [jnp.einsum("gb,ngk->nbk", group.basis, group.both(group.of(slope))) for group in each]
        return jnp.concatenate([part.reshape(len(x), -1) for part in parts], -1)

    def shared(self, weight: Array, x: Array, shift: Array) -> Array:
        """Return the part of a shift ``[d]`` that groups have in common, as far as they share anything."""
        if not self.groups:
            return shift
        return jnp.concatenate([group.smooth(group.of(shift[None])[0]).ravel() for group in self._each(weight, x)])

    def field(self, weight: Array, x: Array, coefficient: Array) -> Array:
        """Return ``Σ_f coefficient_f h_f(x)`` of ``[number, L]``, ``[L, N, d]``."""
        size, outputs = x.shape[-1], coefficient.shape[-1]
        if not self.groups:
            level, steep = coefficient[:size], coefficient[size:]
            field = jnp.broadcast_to(level.T[:, None], (outputs, *x.shape))
            return field + steep.T[:, None] * (x - weigh(weight, x)[None]) if len(steep) else field
        parts, start = [], 0
        for group in self._each(weight, x):
            e = group.away.shape[-1]
            level = coefficient[start : start + (1 + e) * 2 * e].reshape(1 + e, 2 * e, outputs)
            start += (1 + e) * 2 * e
            steep = coefficient[start : start + 2 * e * e].reshape(e, 2 * e, outputs)
            start += 2 * e * e
            both = jnp.einsum("gb,bkl->lgk", group.basis, level)[:, None]
            both = both + jnp.einsum("ngi,ikl->lngk", group.away, steep)
            field = both[..., :e] + jnp.einsum("gij,lngi->lngj", group.cov, both[..., e:])
            parts.append(field.reshape(outputs, len(x), -1))
        return jnp.concatenate(parts, -1)

    def _each(self, weight: Array, x: Array) -> "list[_Groups]":
        starts = [0]
        for number, size in self.groups:
            starts.append(starts[-1] + number * size)
        return [_group(start, shape, weight, x) for start, shape in zip(starts, self.groups, strict=False)]


class _Groups(NamedTuple):
    """The groups of one site.

    Attributes:
        of: ``[N, d]`` -> ``[N, G, e]``, the coordinates of these groups.
        away: ``[N, G, e]``, the particles' distance from the centre.
        cov: ``[G, e, e]``.
        basis: ``[G, 1 + e]``: one, and the centres, as far as they differ.
    """

    of: Callable[[Array], Array]
    away: Array
    cov: Array
    basis: Array

    def both(self, slope: Array) -> Array:
        """Return ``[N, G, 2 e]``: the slopes, and the covariance times the slopes."""
        return jnp.concatenate([slope, jnp.einsum("gij,ngj->ngi", self.cov, slope)], -1)

    @property
    def divergence(self) -> Array:
        """Return that of the linear fields, over all groups: ``[e, 2 e]``."""
        number, size = self.cov.shape[:2]
        return jnp.concatenate([number * jnp.eye(size, dtype=self.cov.dtype), self.cov.sum(0)], -1)

    def smooth(self, shift: Array) -> Array:
        """Return the regression of a shift ``[G, e]`` on the centres and variances."""
        variances = _standard(jnp.diagonal(self.cov, axis1=1, axis2=2))
        columns = jnp.concatenate([self.basis, variances], -1)
        gram = columns.T @ columns + 1e-4 * len(columns) * jnp.eye(columns.shape[1], dtype=columns.dtype)
        return columns @ jnp.linalg.solve(gram, columns.T @ shift)


def _group(start: int, shape: tuple[int, int], weight: Array, x: Array) -> _Groups:
    of = lambda flat: flat[:, start : start + math.prod(shape)].reshape(len(flat), *shape)
    own = of(x)
    centre = jnp.einsum("n,nge->ge", weight, own)
    away = own - centre[None]
    cov = jnp.einsum("n,ngi,ngj->gij", weight, away, away)
    basis = jnp.concatenate([jnp.ones((shape[0], 1), x.dtype), _standard(centre)], -1)
    return _Groups(of, away, cov, basis)


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
    number = sum(2 * e + 4 * e * e for _, e in groups)
    return Fields(number, groups) if number <= most else None
