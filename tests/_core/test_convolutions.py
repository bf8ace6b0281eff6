"""Convolutions are equal to XLA's, and of the form that is fast, however they come about."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random
from jax.extend import core

from numpyro_ebipla._core.convolutions import has_convolutions, with_fast_convolutions

IMAGES, NUMBERS = random.normal(random.key(0), (3, 9, 8, 4)), ("NHWC", "HWIO", "NHWC")


def own(window=(3, 3), features=(4, 6), groups=1, numbers=NUMBERS, **options):
    """A convolution of ``IMAGES``, and weights for it."""
    weights = random.normal(random.key(1), (*window, features[0] // groups, features[1]))
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return lambda x, w: lax.conv_general_dilated(
        x, w, dimension_numbers=numbers, feature_group_count=groups, **options
    ), weights


def transposed(strides, padding, window):
    """A transposed convolution, and weights for it."""
    return lambda x, w: lax.conv_transpose(x, w, strides, padding), random.normal(random.key(1), (*window, 4, 6))


CASES = {
    "plain": own(),
    "valid": own(padding="VALID", window=(2, 5)),
    "strides": own(window_strides=(2, 3), window=(4, 4)),
    "dilated window": own(rhs_dilation=(2, 3)),
    "dilated in both": own(lhs_dilation=(2, 1), rhs_dilation=(2, 2), padding=[(1, 2), (0, 1)]),
    "groups": own(groups=2),
    "features first": (
        lambda x, w: lax.conv(jnp.moveaxis(x, -1, 1), w, (1, 1), "SAME"),
        random.normal(random.key(1), (6, 4, 3, 3)),
    ),
    "transposed": transposed((2, 2), "SAME", (4, 4)),
    "transposed, odd": transposed((3, 2), "VALID", (5, 3)),
    "transposed, window below its strides": transposed((3, 3), "SAME", (2, 2)),
}


def convolutions(jaxpr):
    """All of a program, those within loops included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is lax.conv_general_dilated_p:
            yield eqn
        for inner in jax.tree.leaves([*eqn.params.values()], is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from convolutions(getattr(inner, "jaxpr", inner))


def slopes_in_a_loop(convolve):
    """A program as fits have it: gradients in images and weights, inside a loop."""

    def energy(x, w):
        return jnp.sum(jnp.tanh(convolve(x, w) / 3))

    def move(carry, _):
        value, (x, w) = jax.value_and_grad(energy, (0, 1))(*carry)
        return (carry[0] - 0.1 * x, carry[1] - 0.1 * w), value

    return lambda x, w: lax.scan(move, (x, w), None, length=3)


@pytest.mark.unit
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_xla(case):
    convolve, weights = CASES[case]
    program = slopes_in_a_loop(convolve)
    fast = with_fast_convolutions(program)
    wanted, found = jax.jit(program)(IMAGES, weights), jax.jit(fast)(IMAGES, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), wanted, found)


@pytest.mark.unit
@pytest.mark.parametrize("case", [name for name in CASES if name != "groups"])  # the gradient of groups stays as it is
def test_all_have_features_last_and_the_window_first(case):
    convolve, weights = CASES[case]
    before, after = (
        [*convolutions(jax.make_jaxpr(f)(IMAGES, weights).jaxpr)]
        for f in (slopes_in_a_loop(convolve), with_fast_convolutions(slopes_in_a_loop(convolve)))
    )
    assert len(before) == 3  # forward, and two gradients, which by themselves have other forms
    ordered = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), NUMBERS)
    assert {eqn.params["dimension_numbers"] for eqn in before} != {ordered}
    assert {eqn.params["dimension_numbers"] for eqn in after} == {ordered}
    if "transposed" in case:  # the gradient in the weights is made of products
        assert len(after) == 2


@pytest.mark.unit
def test_many_particles_and_branches():
    """Convolutions under vmap, with weights of each particle's own or common ones, and within a branch."""
    convolve, weights = CASES["transposed"]

    def program(x, w):
        branch = lambda x: lax.cond(x.sum() > 0, lambda x: convolve(x, weights).sum(), lambda x: jnp.sum(x**2), x)
        both = jax.vmap(jax.grad(lambda x, w: jnp.sum(convolve(x, w) ** 2), (0, 1)))(x, w)
        return both, jax.vmap(jax.grad(branch))(x), lax.map(jax.checkpoint(jax.grad(branch)), x)

    args = random.normal(random.key(2), (2, *IMAGES.shape)), random.normal(random.key(3), (2, *weights.shape))
    wanted, found = program(*args), jax.jit(with_fast_convolutions(program))(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), wanted, found)


@pytest.mark.unit
def test_other_programs_are_the_same():
    """Without convolutions nothing is changed, static arguments and structures included."""

    def program(tree, *, power):
        return {"a": lax.fori_loop(0, 3, lambda _, x: jnp.sin(x) ** power, tree["x"]), "n": tree["n"] + 1}

    tree = {"x": random.normal(random.key(0), (5,)), "n": jnp.arange(3)}
    wanted = jax.jit(program, static_argnames="power")(tree, power=3)
    found = jax.jit(with_fast_convolutions(program), static_argnames="power")(tree, power=3)
    jax.tree.map(np.testing.assert_array_equal, wanted, found)
    closed = jax.make_jaxpr(lambda t: program(t, power=3))(tree)
    assert isinstance(closed, core.ClosedJaxpr) and not has_convolutions(closed.jaxpr)
