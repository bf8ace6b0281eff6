"""``EnergyPrior``: an energy-based, unnormalised and learnable prior as a NumPyro distribution."""

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, lax, random
from numpyro.distributions.transforms import biject_to
from numpyro.distributions.util import sum_rightmost

from numpyro_ebipla._core.convolutions import with_fast_convolutions
from numpyro_ebipla._core.errors import EBIPLAWarning
from numpyro_ebipla._core.static import is_array, join_function, split_function
from numpyro_ebipla._core.tree import batched_value_and_grad, normal_like
from numpyro_ebipla.kernels.base import AbstractKernel, run_moves, start
from numpyro_ebipla.model.energy_checks import check_base, check_options, check_real, extends, shape_message
from numpyro_ebipla.smc.anneal import anneal, draw_equally
from numpyro_ebipla.smc.annealing import FINE, Annealing
from numpyro_ebipla.smc.density import TiltedDensity, population_variance
from numpyro_ebipla.smc.normaliser import Estimate, log_normaliser
from numpyro_ebipla.smc.path import Path, move_at

_log_normaliser: ContextVar[Any] = ContextVar("log_normaliser", default=None)
_base_only: ContextVar[bool] = ContextVar("base_only", default=False)


@contextmanager
def subtracting(log_z: Any) -> Iterator[None]:
    """Let ``EnergyPrior.log_prob`` subtract ``log_z``, within this context (it broadcasts to the batch shape).

    Whoever supplies it answers for its derivative too: the warning about a missing normaliser is off.
    """
    token = _log_normaliser.set(log_z)
    try:
        yield
    finally:
        _log_normaliser.reset(token)


@contextmanager
def base_only() -> Iterator[None]:
    """Let ``EnergyPrior.log_prob`` be that of its base, which is normalised, within this context."""
    token = _base_only.set(True)
    try:
        yield
    finally:
        _base_only.reset(token)


class EnergyPrior(dist.Distribution):
    r"""Density proportional to ``exp(−energy(x)) · base.prob(x)``.

    The energy tilts a proper base distribution, so that ``energy = 0`` is the base itself, with known
    normaliser (Pang et al., 2006.08205, eq. 2).

    :meth:`log_prob` is **unnormalised**: it lacks ``−log Z``. This is right for inference of ``x`` with the
    energy fixed (NUTS included) and for :class:`.EBIPLA`, which supplies the gradient of
    ``log Z``. It is **wrong** for SVI or MCMC over the energy's own parameters, or over parameters of its
    base; where they are differentiated outside EBIPLA an ``EBIPLAWarning`` is raised.

    Args:
        energy: what maps ``x`` of shape ``[..., *event_shape]`` to energies ``[...]``: a bound linen, nnx or
            equinox module (``flax_module``, ``nnx_module``, ``eqx_module``) or any function, of
            ``numpyro.param`` values too. A function that accepts a single ``x`` only is mapped over the rest.
            An energy that depends on covariates of the data inside a plate returns ``[..., B]``.
        base: distribution with continuous support and a ``sample`` method.
        num_walkers: least size of the population that :meth:`sample` anneals.
        annealing: how, by default finely: in small stages of many moves.
        kernel: of further moves at the end, as many as at each temperature; none by default.
        validate_args: see NumPyro's ``Distribution``.

    Raises:
        TypeError: if ``energy`` is not callable or ``base`` is not a distribution.
        ValueError: if the base is discrete or cannot be sampled, or the energy's shape does not fit.

    >>> import jax.numpy as jnp, numpyro.distributions as dist
    >>> from jax import random
    >>> prior = EnergyPrior(lambda x: 0.5 * jnp.sum(x**2, -1), dist.Normal(0, 1).expand([2]).to_event(1))
    >>> x = prior.sample(random.key(0), (1000,))  # N(0, 1/2) in each coordinate
    >>> x.shape, bool(abs(x.var() - 0.5) < 0.05)
    ((1000, 2), True)
    """

    arg_constraints: dict[str, Any] = {}
    pytree_data_fields = ("_arrays", "base")
    pytree_aux_fields = ("_static", "_mapped", "num_walkers", "annealing", "kernel")

    def __init__(
        self,
        energy: Callable[[Array], Array],
        base: dist.Distribution,
        *,
        num_walkers: int = 256,
        annealing: Annealing = FINE,
        kernel: AbstractKernel | None = None,
        validate_args: bool | None = None,
    ) -> None:
        check_base(energy, base)
        check_options(num_walkers, annealing, kernel)
        self._arrays, self._static = split_function(energy)
        self.base = base
        self.num_walkers, self.annealing, self.kernel = num_walkers, annealing, kernel
        batch_shape, self._mapped = self._infer_shape()
        super().__init__(batch_shape, base.event_shape, validate_args=validate_args)

    @property
    def support(self) -> dist.constraints.Constraint:
        """The base's support."""
        return self.base.support

    def energy(self, x: Array) -> Array:
        """Return energies ``[*sample_shape, *batch_shape]`` of ``x`` in the constrained space."""
        return self._energy(self._arrays, x)

    @property
    def function(self) -> Callable:
        """The energy as it was given, with copies of the containers that it holds."""
        return join_function(self._arrays, self._static)

    def writes(self, u: Array) -> Array:
        """Return whether a call of the energy changes what it holds, for walkers as :meth:`tilted` has them."""
        x, energy = self.constrain_walkers(u), self.function
        energy(x.reshape((-1, *self.event_shape))[0] if self._mapped else x)
        after, _ = split_function(energy)
        plain = lambda a: random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else jnp.asarray(a)
        if len(after) != len(self._arrays):
            return jnp.ones((), bool)
        return jnp.asarray([jnp.any(plain(a) != plain(b)) for a, b in zip(self._arrays, after, strict=True)]).any()

    def _energy(self, arrays: Any, x: Array) -> Array:
        energy = join_function(arrays, self._static)
        if not self._mapped:
            return energy(x)
        lead = x.shape[: x.ndim - self.event_dim]
        return jax.vmap(energy)(x.reshape((-1, *self.event_shape))).reshape(lead)

    def log_prob(self, value: Array) -> Array:
        """Return the unnormalised log density ``base.log_prob(value) − energy(value)``."""
        log_z, base, arrays = _log_normaliser.get(), self.base, self._arrays
        if _base_only.get():
            shape = jnp.shape(value)[: jnp.ndim(value) - self.event_dim]
            return jnp.broadcast_to(base.log_prob(value), lax.broadcast_shapes(shape, self.batch_shape))
        if log_z is None:
            log_z, (base, arrays) = 0.0, jax.tree.map(_watched, (base, arrays))
        return base.log_prob(value) - self._energy(arrays, value) - log_z

    def potential(self, value: Array) -> Array:
        """Return minus the unnormalised log density of the unconstrained ``value``, that of :meth:`tilted` walkers."""
        transform = biject_to(self.support)
        log_det = transform.log_abs_det_jacobian(transform.inv(value), value)
        log_det = sum_rightmost(log_det, log_det.ndim - jnp.ndim(value) + self.event_dim)
        return self.energy(value) - self.base.log_prob(value) - log_det

    def tilted(self) -> TiltedDensity:
        """Return base and energy as functions of unconstrained walkers ``[P, *event]``, or ``[P, D, *event]``.

        The second where ``batch_shape`` is not empty: ``D`` is its product. The Jacobian of the map to the
        support belongs to the base.
        """
        transform = biject_to(self.support)
        batch, event_dim = self.batch_shape, self.event_dim
        unconstrained = transform.inverse_shape(batch + self.event_shape)
        flat = (-1,) if batch else ()

        def constrain(u: Array) -> tuple[Array, Array]:
            u = u.reshape(u.shape[:1] + unconstrained)
            return u, transform(u)

        def log_base(u: Array) -> Array:
            u, x = constrain(u)
            log_det = transform.log_abs_det_jacobian(u, x)
            log_det = sum_rightmost(log_det, log_det.ndim - x.ndim + event_dim)
            value = jnp.broadcast_to(self.base.log_prob(x) + log_det, u.shape[:1] + batch)
            return value.reshape(u.shape[:1] + flat)

        def energy(u: Array) -> Array:
            value = self.energy(constrain(u)[1])
            return value.reshape(u.shape[:1] + flat)

        def sample_base(rng_key: Array, num: int) -> Array:
            expanded = self.base.expand(batch) if self.base.batch_shape != batch else self.base
            u = transform.inv(expanded.sample(rng_key, (num,)))
            return u.reshape((num, *flat, *unconstrained[len(batch) :]))

        return TiltedDensity(log_base, energy, sample_base)

    def constrain_walkers(self, u: Array) -> Array:
        """Map walkers as :meth:`tilted` has them to ``[P, *batch_shape, *event_shape]``."""
        transform = biject_to(self.support)
        shape = transform.inverse_shape(self.batch_shape + self.event_shape)
        return transform(u.reshape(u.shape[:1] + shape))

    def as_walkers(self, x: Any) -> Array:
        """Map values ``[..., *batch_shape, *event_shape]`` to walkers as :meth:`tilted` has them.

        Elements that share a normaliser (axes left of the batch shape, or of length one in it) are walkers.
        """
        transform = biject_to(self.support)
        u, event = transform.inv(x), transform.inverse_shape(self.event_shape)
        lead = u.ndim - len(event)
        own = [lead - i for i, size in enumerate(reversed(self.batch_shape), 1) if size > 1][::-1]
        shared = [i for i in range(lead) if i not in own]
        flat = (math.prod(self.batch_shape),) if self.batch_shape else ()
        return u.transpose((*shared, *own, *range(lead, u.ndim))).reshape((-1, *flat, *event))

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw from the normalised density, by annealing a population from the base.

        They are exchangeable but not independent: draws of one call share their population's resampling, after which
        they make as many moves as at each temperature.
        """
        num = 1
        for size in sample_shape:
            num *= size
        return _sample(self, key, num=num).reshape(sample_shape + self.batch_shape + self.event_shape)

    def log_normalizer(self, rng_key: Array, num_populations: int = 4) -> Estimate:
        """Estimate ``log Z = log ∫ exp(−energy) base`` and its standard error, each of ``batch_shape``.

        Independent populations are annealed as in :meth:`sample`, of 4 × ``num_walkers`` walkers each (of
        ``num_walkers``, if every element of ``batch_shape`` has a normaliser of its own), and pooled by
        :func:`.smc.normaliser.pooled`. More ``num_walkers`` or ``annealing`` moves make the error smaller.

        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> prior = EnergyPrior(lambda x: 0.5 * x**2, dist.Normal(0, 1))
        >>> log_z, error = prior.log_normalizer(random.key(0))
        >>> bool(abs(log_z - jnp.log(0.5) / 2) < 0.05)
        True
        """
        return _log_normalizer(self, rng_key, num_populations=num_populations)

    def _infer_shape(self) -> tuple[tuple[int, ...], bool]:
        """Return the batch shape of base and energy together, and whether the energy takes single points only."""
        batch, event = self.base.batch_shape, self.base.event_shape
        call = join_function(self._arrays, self._static)

        def returned(*shape: int) -> tuple[int, ...] | Exception:
            try:
                return jnp.shape(jax.eval_shape(call, jax.ShapeDtypeStruct(shape, jnp.result_type(float))))
            except Exception as e:  # whatever the user's function raises
                return e

        one = returned(*batch, *event)
        if isinstance(one, tuple):
            check_real(jax.eval_shape(call, jax.ShapeDtypeStruct((*batch, *event), jnp.result_type(float))).dtype)
            full = one or batch
            if extends(full, batch) and returned(3, *full, *event) == (3, *full):
                return full, False
        if (returned(*event) if batch else one) == ():
            return batch, True
        raise ValueError(shape_message(one, batch, event))


@functools.partial(jax.jit, static_argnames="num")
@with_fast_convolutions
def _sample(prior: EnergyPrior, rng_key: Array, *, num: int) -> Array:
    key_anneal, key_draw = random.split(rng_key)
    density = prior.tilted()
    population = anneal(key_anneal, density, max(num, prior.num_walkers), prior.annealing)
    draws = draw_equally(key_draw, population.position, population.log_weight, num)
    key_moves, num_moves = random.fold_in(key_draw, 1), prior.annealing.num_moves
    if prior.kernel is not None:
        return prior.constrain_walkers(_move(key_moves, prior.kernel, density, draws, num_moves))
    # Walkers of more weight than others were drawn more than once.
    variance = population_variance(population.position, population.log_weight)
    end = Path(jnp.ones(()), population.log_step[-1], variance)
    moved, _ = move_at(key_moves, density, density.evaluate(draws), end, num_moves)
    return prior.constrain_walkers(moved.position)


@functools.partial(jax.jit, static_argnames="num_populations")
@with_fast_convolutions
def _log_normalizer(prior: EnergyPrior, rng_key: Array, *, num_populations: int) -> Estimate:
    num_walkers = prior.num_walkers if prior.batch_shape else 4 * prior.num_walkers
    found = log_normaliser(rng_key, prior.tilted(), num_walkers, num_populations, prior.annealing)
    return jax.tree.map(lambda x: x.reshape(prior.batch_shape), found)


def _move(rng_key: Array, kernel: AbstractKernel, density: TiltedDensity, x: Array, num_moves: int) -> Array:
    """Move ``x`` by a kernel towards the tilted density."""
    target = batched_value_and_grad(density.log_density)
    point, adapt = start(kernel, target, x)
    if kernel.has_momentum:
        point = point._replace(momentum=normal_like(random.fold_in(rng_key, num_moves), x))
    return run_moves(kernel, random.split(rng_key, num_moves), target, point, adapt)[0].position


def unwrap(fn: dist.Distribution) -> dist.Distribution:
    """Return the distribution inside ``expand``, ``mask`` and ``to_event``."""
    wrappers = (dist.ExpandedDistribution, dist.MaskedDistribution, dist.Independent)
    while isinstance(fn, wrappers):
        fn = fn.base_dist
    return fn


def _watched(x: Any) -> Any:
    return _warn_if_differentiated(x) if is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact) else x


@jax.custom_jvp
def _warn_if_differentiated(x: Array) -> Array:
    return x


def _warn_jvp(primals: tuple[Array], tangents: tuple[Any]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    if not isinstance(dx, jax.custom_derivatives.SymbolicZero):
        warnings.warn(
            "the log density of an EnergyPrior is being differentiated with respect to parameters of its "
            "energy or its base outside EBIPLA. It lacks the normaliser −log Z, so SVI or MCMC over these "
            "parameters is wrong: fit them with EBIPLA(model).run(...), or hide them from the inference: "
            "numpyro.handlers.block(numpyro.handlers.substitute(model, params), hide=[*params]).",
            EBIPLAWarning,
            stacklevel=2,
        )
    else:
        dx = jnp.zeros_like(x)
    return x, dx


_warn_if_differentiated.defjvp(_warn_jvp, symbolic_zeros=True)
