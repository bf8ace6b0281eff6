"""Linear algebra of few columns agrees with NumPy's, on both sides of the number that is few."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_ebipla._core.few import FEW, apply, cross, solver, weigh

pytestmark = pytest.mark.unit
SIZES = range(1, FEW + 3)


@pytest.mark.parametrize("size", SIZES)
def test_solutions_are_numpys_for_many_matrices_at_once(size):
    rng = np.random.default_rng(size)
    root = rng.normal(size=(5, size + 3, size)).astype(np.float32)
    matrix, b = np.einsum("mni,mnj->mij", root, root), rng.normal(size=(5, size)).astype(np.float32)
    found = jax.vmap(lambda matrix, b: solver(matrix)(b))(matrix, b)
    exact = np.linalg.solve(matrix.astype(np.float64), b[..., None])[..., 0]
    condition = np.linalg.cond(matrix).max()
    np.testing.assert_allclose(found, exact, rtol=0, atol=10 * condition * 6e-8 * np.abs(exact).max())


@pytest.mark.parametrize("size", SIZES)
def test_derivatives_are_those_of_the_inverse(size):
    """``d (A⁻¹ b) = −A⁻¹ dA A⁻¹ b``, for a change that is symmetric."""
    rng = np.random.default_rng(size)
    root, change = rng.normal(size=(2, size + 3, size))
    matrix, change, b = root.T @ root, change.T @ change, rng.normal(size=size)
    with jax.enable_x64(True):
        solved = lambda matrix: solver(matrix)(jnp.asarray(b))
        _, found = jax.jvp(solved, (jnp.asarray(matrix),), (jnp.asarray(change),))
    np.testing.assert_allclose(found, -np.linalg.solve(matrix, change @ np.linalg.solve(matrix, b)), rtol=1e-8)


@pytest.mark.parametrize("size", SIZES)
def test_products_are_numpys(size):
    rng = np.random.default_rng(size)
    a, b = rng.normal(size=(2, 20, size)).astype(np.float32)
    weight, vector = rng.normal(size=20).astype(np.float32), rng.normal(size=size).astype(np.float32)
    np.testing.assert_allclose(cross(a, b), a.T @ b, atol=1e-5)
    np.testing.assert_allclose(weigh(weight, a), weight @ a, atol=1e-5)
    np.testing.assert_allclose(apply(a, vector), a @ vector, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_a_matrix_that_is_not_positive_has_no_solution(size):
    assert not np.isfinite(solver(-jnp.eye(size))(jnp.ones(size))).any()
