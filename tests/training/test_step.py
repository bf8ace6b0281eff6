"""The brakes on the energy: when they hold, and when they must not."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import grad, random

from numpyro_ebipla import EBIPLA, EnergyPrior, Persistent, Tempered
from numpyro_ebipla.smc.density import TiltedDensity
from numpyro_ebipla.training.safeguards import Gap, Restraint, energy_brake, hole_penalty, measure_gap


def brake(gap, deviation=1.0, strategy=None):
    config = SimpleNamespace(walkers={"x": strategy or Tempered()})
    gap = jnp.float32(gap)
    return float(energy_brake(config, {"x": Gap(gap, gap, jnp.float32(deviation), gap)}))


@pytest.mark.unit
def test_small_gaps_hold_nothing_back():
    assert brake(0.0) == brake(1.9) == 1.0
    assert brake(5.0, deviation=5.0) == 1.0


@pytest.mark.unit
def test_a_growing_gap_slows_the_energy_down_and_then_turns_it_back():
    """Held at zero only, digits with d = 32 (seed 1) kept a hole: a gap of 4 nats for good."""
    values = [brake(gap) for gap in (2.0, 2.5, 3.0, 10.0, 1e6)]
    assert values == sorted(values, reverse=True) and values[0] == 1.0
    assert values[2] < 0 and values[-1] == pytest.approx(-1.0)


@pytest.mark.unit
def test_a_hole_that_the_walkers_have_found_is_filled_at_full_rate():
    """A brake on either sign of the gap once froze such a hole: digits, d = 16, log Z of 57,000 and no warning."""
    assert brake(-1e6) == 1.0


@pytest.mark.unit
def test_strategies_without_a_brake():
    assert brake(1e6, 0.0, Persistent()) == 1.0


@pytest.mark.unit
def test_a_few_walkers_in_a_hole_do_not_lift_the_brake():
    """Two of 128 walkers at −3000 gave a deviation of 370: digits with d = 32, seed 1, ran away."""
    x = random.normal(random.key(0), (128,)).at[:2].set(3000.0)
    gap = measure_gap(jnp.full(128, 1 / 128), -x, jnp.float32(-50.0))
    assert float(gap.deviation) < 1.5 and 49 < float(gap.median) < 51


@pytest.mark.unit
def test_the_restraint_is_the_communication_barrier():
    """For the energy a·x under N(0, 1) all tempered laws have unit variance: ½ 𝔼|E − E'| = a/√π at every t."""
    a, num = 1.5, 20_000
    temperature = jnp.linspace(0, 1, 8) ** 2
    x = random.normal(random.key(1), (8, num)) - a * temperature[:, None]
    density = TiltedDensity(lambda x: -0.5 * x**2, lambda x: a * x, None)
    penalty = Restraint(x, jnp.zeros_like(x), temperature, jnp.float32(2.0)).penalty(density)
    assert float(penalty) == pytest.approx(2 * a / np.sqrt(np.pi), abs=4 * 2 * a * 0.85 / np.sqrt(8 * num / 2))


def test_a_hole_is_filled_and_a_constant_has_no_slope():
    """One particle of four lies 50 below all walkers: only it is raised, as much as the walkers' mean is lowered."""
    walkers, particles = jnp.linspace(-1, 1, 100), jnp.array([0.0, 0.5, -0.5, -50.0])

    def penalty(height, constant):
        energy = lambda x: x + constant + height * (x < -10)
        weight = jnp.full(100, 0.01)
        gap = measure_gap(weight, energy(walkers), jnp.float32(0))
        return hole_penalty(gap, energy(particles), weight, energy(walkers))

    raised, constant = grad(penalty, (0, 1))(0.0, 0.0)
    assert float(raised) == pytest.approx(-2 / 4) and float(constant) == pytest.approx(0.0, abs=1e-6)
    assert float(penalty(60.0, 3.0)) == 0.0


@pytest.mark.parametrize("dim", [1, 2, 8, 32])
@pytest.mark.parametrize("spike", [0.0, 0.03])
def test_a_right_prior_has_no_holes(dim, spike):
    """Walkers and particles of one law, a normal one, or with 3 % of its mass in a spike 10 times narrower.

    In the energy alone a base narrower than the prior gave a penalty at the optimum, 0.024 nats a datum; in the
    potential, a spike of less mass than the floor's quantile would be one.
    """
    mixture = lambda x: jnp.logaddexp(
        jnp.log1p(-spike) - 0.5 * jnp.sum(x**2, -1),
        jnp.log(spike) - 50 * jnp.sum(x**2, -1) + dim * jnp.log(10.0),
    )

    def draw(key, num):
        key_scale, key_normal = random.split(key)
        scale = jnp.where(random.bernoulli(key_scale, spike, (num, 1)), 0.1, 1.0)
        return -mixture(scale * random.normal(key_normal, (num, dim)))

    weight, slope = jnp.full(1000, 1e-3), []
    for seed in range(20):
        walkers, particles = draw(random.key(seed), 1000), draw(random.key(100 + seed), 400)
        gap = measure_gap(weight, walkers, particles)
        slope.append(float(jnp.abs(grad(hole_penalty, 1)(gap, particles, weight, walkers)).sum()))
        assert float(energy_brake(SimpleNamespace(walkers={"x": Tempered()}), {"x": gap})) == 1.0
    assert np.mean(slope) < 2e-3, "share of the contrast's own pull"


def test_weights_of_the_walkers_count_in_the_gap():
    """Walkers of the base beside those of the prior, weighted to it, see the same gap as the latter alone."""
    a, num = 2.0, 100_000
    base = random.normal(random.key(2), (num,))
    prior = random.normal(random.key(3), (num,)) - a
    both = jnp.concatenate([base, prior])
    weight = jnp.exp(-a * both - jnp.logaddexp(0.0, -a * both - a**2 / 2))  # log Z = a²/2
    weighted = measure_gap(weight / weight.sum(), a * both, jnp.float32(0))
    alone = measure_gap(jnp.full(num, 1 / num), a * prior, jnp.float32(0))
    for ours, theirs in zip(weighted, alone, strict=True):
        assert float(ours) == pytest.approx(float(theirs), abs=5 * 3 * a / np.sqrt(num))


def test_no_step_changes_the_energy_by_more_than_the_trust_region_which_falls():
    """Energy a·x under N(0, 1), whose walkers have unit variance: the change is that of a."""

    def model(y):
        a = numpyro.param("a", 0.0)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", EnergyPrior(lambda x: a * x, dist.Normal(0, 1)), obs=y)

    y = jnp.full(4, 3.0)
    ebipla = EBIPLA(model, optim=optax.sgd(100.0), prior=Tempered(num_walkers=512, trust=0.05))
    for step in (0, 3000):
        state = ebipla.init(random.key(0), y)._replace(step=jnp.asarray(step, jnp.int32))
        after, _ = ebipla.update(state, y)
        bound = 0.05 / np.sqrt(1 + step / 1000)
        assert abs(float(after.params["a"])) == pytest.approx(bound, rel=5 / np.sqrt(2 * 512))


@pytest.mark.slow
def test_a_constant_in_the_energy_does_not_drift():
    """Its gradient is rounding, and Adam's step has the size of its rate: −22 after 5,000 steps of the roll."""

    def model(y):
        a, constant = numpyro.param("a", 0.0), numpyro.param("constant", 0.0)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", EnergyPrior(lambda x: a * x + constant, dist.Normal(0, 1)))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y)

    ebipla = EBIPLA(model, num_samples=1, warmup=0, prior=Tempered(num_walkers=64, num_rungs=4))
    fit = ebipla.run(random.key(0), jnp.linspace(0, 3, 300), num_steps=500, progress_bar=False)
    assert abs(float(fit.params["constant"])) < 0.1 and float(fit.params["a"]) < -1
