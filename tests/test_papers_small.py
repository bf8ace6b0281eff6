"""The toy hierarchy of the papers' benchmarks at a tiny size, against closed forms."""

import numpy as np
import pytest

from benchmarks.papers import __main__ as papers
from benchmarks.papers import toy_hierarchy as toy

SETTINGS = toy.Settings(
    num_data=10, num_particles=200, num_steps=80, repeats=1, ipla_steps=(), kiplmc_steps=(), pgd_steps=(1.0,)
)


def test_critical_step_is_that_of_the_recursion():
    for size in (1, 10, 100):
        for factor, grows in ((0.99, False), (1.01, True)):
            h = factor * toy.critical_step(size)
            step = np.eye(2) + h * np.array([[-size, size], [1.0, -2.0]])
            assert (np.abs(np.linalg.eigvals(step)).max() > 1) == grows


@pytest.mark.parametrize("factor", [0.5, 1.3])
def test_pgd_converges_below_the_critical_step_and_diverges_above(factor):
    c = factor * toy.critical_step(SETTINGS.num_data) * (2 + SETTINGS.num_data)
    s = SETTINGS._replace(pgd_steps=(c,))
    report = toy.run(False, 0, None, s)
    (curve,), (closed,) = report.data["rms"].values(), report.data["closed_form"].values()
    if factor < 1:
        assert closed[-1] < 0.05 and curve[-1] < 4 * closed[-1]
        assert report.rows[1][1] == pytest.approx(report.rows[1][2], rel=0.15)  # 10 × 199 degrees of freedom
    else:
        assert curve[-1] == pytest.approx(closed[-1], rel=0.1) and curve[-1] > 100


def test_closed_form_of_the_kinetic_moves_agrees_with_the_packages_integrals():
    from numpyro_ebipla.kernels import kinetic_terms

    move, terms = toy.underdamped(0.3, 2.0), kinetic_terms(0.3, 2.0)
    np.testing.assert_allclose(move.a, [[1, terms.drift], [0, terms.decay]], rtol=1e-5)
    np.testing.assert_allclose(move.b, [terms.drift_x, terms.drift], rtol=1e-4)
    root = np.array([[terms.noise_x, terms.noise_x_from_v], [0, terms.noise_v]])
    np.testing.assert_allclose(move.q, root @ root.T, rtol=1e-4)


def test_one_experiment_that_fails_does_not_keep_the_others_from_running(monkeypatch):
    """Without MNIST's file the Bayesian network ended ``make papers``, and two that need no file never ran."""
    done = []

    def run(name, full, seed, data_dir):
        if name == "bnn":
            raise FileNotFoundError("mnist_10k.npz")
        done.append(name)

    monkeypatch.setattr(papers, "run", run)
    with pytest.raises(SystemExit, match=r"bnn failed: FileNotFoundError\('mnist_10k.npz'\)"):
        papers.main(["all"])
    assert done == [name for name in papers.NAMES if name != "bnn"]
