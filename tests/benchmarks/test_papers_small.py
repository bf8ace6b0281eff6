"""The papers' benchmarks: the toy hierarchy at a tiny size, against closed forms, and how others are put together."""

import numpy as np
import numpyro.distributions as dist
import pytest
from jax import random

from benchmarks.papers import __main__ as papers
from benchmarks.papers import latent_ebm as latent
from benchmarks.papers import mnist_ebm
from benchmarks.papers import toy_hierarchy as toy
from benchmarks.papers.course import Course

SETTINGS = toy.Settings(
    num_data=10, num_particles=200, num_steps=80, repeats=1, ipla_steps=(), kiplmc_steps=(), pgd_steps=(1.0,)
)


@pytest.mark.unit
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


@pytest.mark.unit
def test_closed_form_of_the_kinetic_moves_agrees_with_the_packages_integrals():
    from numpyro_ebipla.kernels.langevin import kinetic_terms

    move, terms = toy.underdamped(0.3, 2.0), kinetic_terms(0.3, 2.0)
    np.testing.assert_allclose(move.a, [[1, terms.drift], [0, terms.decay]], rtol=1e-5)
    np.testing.assert_allclose(move.b, [terms.drift_x, terms.drift], rtol=1e-4)
    root = np.array([[terms.noise_x, terms.noise_x_from_v], [0, terms.noise_v]])
    np.testing.assert_allclose(move.q, root @ root.T, rtol=1e-4)


@pytest.mark.unit
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


def test_the_seed_moves_the_fits_and_not_the_data_alone(monkeypatch):
    """The fits of latent_ebm once had fixed keys, so that two seeds were one run on two sets of data."""

    class Stop(Exception):
        pass

    def stop(system, rng_key, *args):
        raise Stop(tuple(np.asarray(random.key_data(rng_key))))

    monkeypatch.setattr(latent, "follow", stop)
    for problem in (latent.swiss_roll, latent.digits):
        keys = set()
        for seed in (0, 1):
            with pytest.raises(Stop) as stopped:
                problem(latent.REDUCED, seed)
            keys.add(stopped.value.args[0])
        assert len(keys) == 2


@pytest.mark.unit
def test_speed_is_compared_where_quality_stays():
    """A lucky look in a course that fluctuates once counted as having got there."""
    course = lambda seconds, quality: Course(seconds, quality, 0.1, {}, 0.0, None)
    courses = {
        latent.BEST: course([10.0, 20.0, 30.0], [3.0, 0.9, 1.0]),
        latent.DEFAULT: course([1.0, 2.0, 3.0], [4.0, 1.05, 0.1]),
        latent.PLAIN: course([1.0, 2.0, 3.0], [4.0, 0.5, 1.5]),
    }
    default, plain = latent.speed_rows("roll", courses)
    assert default[1] == "10.0 ×" and "default" in default[0]
    assert plain[1] == "not reached" and latent.PLAIN in plain[0]


def test_jarzynskis_running_cross_entropy_is_by_passive_walkers():
    """Those that move the parameters ended at 138 nats where annealing gives 174."""
    for settings in (mnist_ebm.REDUCED, mnist_ebm.FULL):
        priors = {name: system.prior for name, system in mnist_ebm.systems(dist.Normal(0, 1), settings)}
        assert priors["jarzynski"].num_passive == settings.num_passive > 0
        assert priors["pcd"].num_passive == 0
