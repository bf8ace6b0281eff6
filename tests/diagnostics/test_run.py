"""Checks of draws, on draws that are known."""

import numpy as np
import pytest

from numpyro_ebipla.diagnostics.run import TIES, _ties

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("num", [8, 64])
def test_ties_of_rounded_draws_are_a_share_of_pairs_whatever_their_number(num):
    """As draws shared with any of 63 others, those of a variance at zero were a false alarm, five times of five."""
    draws = np.random.default_rng(0).normal(size=(num, 200, 20))
    expected = 0.05 / (2 * np.sqrt(np.pi))
    pairs = num * (num - 1) / 2 * 200
    off = _ties(np.round(draws / 0.05) * 0.05) - expected  # the largest of twenty
    assert 0 < off < 5 * np.sqrt(expected / pairs)
    assert _ties(draws) == 0 and _ties(draws[:1]) == 0
    assert _ties(np.round(draws * 1e3) / 1e3) < TIES.limit, "a thousandth of the spread is fine enough"


def test_a_lump_at_the_edge_is_a_tie():
    """A tenth of the mass at one value: a hundredth of all pairs."""
    rng = np.random.default_rng(1)
    draws = np.where(rng.random((16, 400, 10)) < 0.1, 1.0, rng.random((16, 400, 10)))
    draws[..., 1:] = rng.random((16, 400, 9))  # of one latent of ten
    assert _ties(draws) == pytest.approx(0.01, rel=0.3) and _ties(draws) > TIES.limit
