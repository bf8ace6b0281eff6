"""Convolutions in the form for which XLA has fast code on a CPU.

There a convolution is fast if features are its last axis and the window its first axes. XLA brings others into this
form at the top of a program only. Gradients of convolutions are such others, and all that is done here runs inside
loops, where they took three to twenty times as long. So axes are put in order in the differentiated program. The
gradient in the weights of a dilated convolution, as transposed ones are, has a window as large as the image: as one
product of matrices for each entry of the weights' window it takes a third of the time, in a loop or not.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

_Slice = tuple[int, int, int]


def has_convolutions(jaxpr: core.Jaxpr) -> bool:
    """Return whether a program, or one within it, convolves."""
    return any(eqn.primitive is lax.conv_general_dilated_p or _hold_some(eqn.params) for eqn in jaxpr.eqns)


def with_fast_convolutions(fun: Callable) -> Callable:
    """Return a function of the same values, up to rounding, whose convolutions have the form that is fast.

    It is differentiated no more, but compiled. Where the device is no CPU it stays as it is.

    >>> image, window = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))
    >>> f = jax.grad(lambda x: lax.conv_transpose(x, window, (2, 2), "SAME").sum())
    >>> bool(jnp.allclose(f(image), with_fast_convolutions(f)(image)))
    True
    """

    @wraps(fun)
    def changed(*args: Any, **static: Any) -> Any:
        if jax.default_backend() != "cpu":
            return fun(*args, **static)
        closed, shapes = jax.make_jaxpr(partial(fun, **static), return_shape=True)(*args)
        run = core.jaxpr_as_fun(_change_program(closed))
        return jax.tree.unflatten(jax.tree.structure(shapes), run(*jax.tree.leaves(args)))

    return changed


def _is_program(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _hold_some(params: Any) -> bool:
    """Return whether there are convolutions in the programs among the parameters of an equation."""
    programs = filter(_is_program, jax.tree.leaves(params, is_leaf=_is_program))
    return any(has_convolutions(_open(program)) for program in programs)


def _open(program: Any) -> core.Jaxpr:
    """Return a program without its constants; from JAX 0.12 on it is what holds these, too."""
    return program.jaxpr if isinstance(program, core.ClosedJaxpr) else program


def _change_program(value: Any) -> Any:
    """Return a program with its convolutions changed, or what is none as it is."""
    if not _is_program(value):
        return value
    bare = _open(value)
    changed = bare.replace(eqns=[_change(eqn) for eqn in bare.eqns])
    return changed if bare is value else core.ClosedJaxpr(changed, value.consts)


def _change(eqn: core.JaxprEqn) -> core.JaxprEqn:
    if eqn.primitive is lax.conv_general_dilated_p:
        convolution = _Convolution(**{name: eqn.params[name] for name in _Convolution._fields})
        if convolution.batch_group_count > 1:
            return eqn
        (call,) = jax.make_jaxpr(jax.jit(convolution.fast))(*[x.aval for x in eqn.invars]).eqns
        return call.replace(invars=eqn.invars, outvars=eqn.outvars)
    change = lambda value: jax.tree.map(_change_program, value, is_leaf=_is_program) if _hold_some(value) else value
    return eqn.replace(params={name: change(value) for name, value in eqn.params.items()})


class _Convolution(NamedTuple):
    """The parameters of ``lax.conv_general_dilated``; those of axes are of the spatial ones."""

    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    dimension_numbers: lax.ConvDimensionNumbers
    feature_group_count: int
    batch_group_count: int
    precision: Any
    preferred_element_type: Any

    def fast(self, lhs: Array, rhs: Array) -> Array:
        """Convolve in the way that is faster."""
        size = self.size(lhs, rhs)
        window = [rhs.shape[i] for i in self.dimension_numbers.rhs_spec[2:]]
        dilations = [*zip(self.lhs_dilation, self.rhs_dilation, strict=True)]
        dilated = any(max(pair) > 1 for pair in dilations) and not any(min(pair) > 1 for pair in dilations)
        if dilated and self.feature_group_count == 1 and math.prod(window) > math.prod(size):
            return self.by_products(lhs, rhs, size)
        return self.in_order(lhs, rhs)

    def size(self, lhs: Array, rhs: Array) -> list[int]:
        """Return the spatial shape of what comes out."""
        out = jax.eval_shape(lambda *args: lax.conv_general_dilated(*args, **self._asdict()), lhs, rhs)
        return [out.shape[i] for i in self.dimension_numbers.out_spec[2:]]

    def in_order(self, lhs: Array, rhs: Array) -> Array:
        """Convolve with features last and the window first."""
        of_lhs, of_rhs, of_out = self.dimension_numbers
        last, space = lhs.ndim - 1, tuple(range(1, lhs.ndim - 1))
        numbers = lax.ConvDimensionNumbers((0, last, *space), (last, last - 1, *range(last - 1)), (0, last, *space))
        images = lhs.transpose(_features_last(of_lhs))
        weights = rhs.transpose((*of_rhs[2:], of_rhs[1], of_rhs[0]))
        params = self._replace(dimension_numbers=numbers)._asdict()
        return _as_laid_out(lax.conv_general_dilated(images, weights, **params), _features_last(of_out))

    def by_products(self, lhs: Array, rhs: Array, size: list[int]) -> Array:
        """Convolve by a product for each place of what comes out."""
        of_lhs, of_rhs, of_out = self.dimension_numbers
        over = ((of_lhs[1:], of_rhs[1:]), ((), ()))
        parts = []
        for place in itertools.product(*map(range, size)):
            left, right = lhs, rhs
            for axis, index in enumerate(place):
                at_left, at_right = of_lhs[2 + axis], of_rhs[2 + axis]
                meet = self.meeting(axis, index, lhs.shape[at_left], rhs.shape[at_right])
                left = lax.slice_in_dim(left, *meet[0], axis=at_left)
                right = lax.slice_in_dim(right, *meet[1], axis=at_right)
            parts.append(lax.dot_general(left, right, over, self.precision, self.preferred_element_type))
        out = jnp.stack(parts).reshape(*size, *parts[0].shape)
        return _as_laid_out(out, (*of_out[2:], *of_out[:2]))

    def meeting(self, axis: int, index: int, length: int, window: int) -> tuple[_Slice, _Slice]:
        """Return which elements of the image and of the window meet, as ``(start, stop, step)``, at a place."""
        spread, step = self.lhs_dilation[axis], self.rhs_dilation[axis]
        first = index * self.window_strides[axis] - self.padding[axis][0]
        place = [(first + step * w, w) for w in range(window)]
        pairs = [(at // spread, w) for at, w in place if at % spread == 0 and 0 <= at <= (length - 1) * spread]
        if not pairs:
            return (0, 0, 1), (0, 0, 1)
        (left, right), (end_left, end_right) = pairs[0], pairs[-1]
        return (left, end_left + 1, step), (right, end_right + 1, spread)


def _features_last(spec: Sequence[int]) -> tuple[int, ...]:
    return (spec[0], *spec[2:], spec[1])


def _as_laid_out(x: Array, axes: tuple[int, ...]) -> Array:
    """Return the array whose axis ``axes[i]`` is axis i of ``x``."""
    return x.transpose([axes.index(i) for i in range(x.ndim)])
