"""The brake on the energy: when it holds, and when it must not."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from numpyro_ebipla import Persistent, Tempered
from numpyro_ebipla.step import energy_brake


def brake(gap, barrier_brake, strategy):
    config = SimpleNamespace(walkers={"x": strategy})
    info = {"x/brake": jnp.asarray(barrier_brake)}
    return float(energy_brake(config, info, {"x": (jnp.asarray(gap), jnp.asarray(2.0))}))


@pytest.mark.parametrize(
    ("gap", "barrier_brake", "expected"),
    [(1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (30.0, 1.0, 0.01), (1.0, 0.25, 0.25), (6.0, 0.5, 0.125)],
)
def test_the_energy_waits_for_walkers_that_are_left_behind(gap, barrier_brake, expected):
    assert brake(gap, barrier_brake, Tempered()) == pytest.approx(expected)


@pytest.mark.parametrize("barrier_brake", [0.0, 1.0])
def test_a_hole_that_walkers_have_found_is_filled_at_full_speed(barrier_brake):
    """A brake on either sign of the gap once froze such a hole: digits, d = 16, log Z of 57,000 and no warning."""
    assert brake(-500.0, barrier_brake, Tempered()) == 1.0


def test_the_papers_walkers_have_no_brake():
    assert brake(1e6, 0.0, Persistent()) == 1.0
