"""What a terminal and a notebook show."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import random

from numpyro_ebipla import EBIPLA, ULA
from numpyro_ebipla.diagnostics.checks import Diagnostics, Rule
from numpyro_ebipla.results.estimates import ComparisonTable, ParameterTable, likelihood_ratio
from numpyro_ebipla.smc.normaliser import Estimate
from tests.models import fitter, one_level


@pytest.mark.unit
def test_tables_are_shown_as_they_are_printed_and_as_html():
    numbers = np.array([1.0, np.nan])
    params = ParameterTable(("a<b", "s"), numbers, numbers, numbers, numbers, 0.95)
    row = {"log_likelihood": -1.0, "std_error": 0.1, "parameters": 2, "aic": 6.0, "bic": 7.0}
    test = likelihood_ratio(Estimate(-2.0, 0.1), Estimate(-1.0, 0.1), 1)
    compared = ComparisonTable({"one": row, "two": row}, {("one", "two"): test})
    checked = Diagnostics((Rule("R-hat", 1.1, "chains agree", "they do not", "warmup=500").judge(1.3, "x"),))
    for table, rows in ((params, 2), (compared, 2), (checked, 1)):
        assert repr(table) == str(table) and len(str(table).splitlines()) >= rows + 1
        html = table._repr_html_()
        assert html.count("<tr>") == rows + 1 and "<b" not in html.replace("<body", "").replace("<tbody", "")
    assert "a&lt;b" in params._repr_html_() and "level there" in params._repr_html_()
    assert "two against one" in compared._repr_html_()


@pytest.mark.unit
def test_an_object_says_what_it_is():
    assert repr(EBIPLA(one_level)) == "EBIPLA(one_level)"
    other = EBIPLA(one_level, num_particles=8, kernel=ULA(0.1), optim=optax.sgd(0.1), hold={"mu": jnp.array(1.0)})
    assert repr(other).startswith("EBIPLA(one_level, num_particles=8, posterior=Particles(kernel=ULA(")
    assert "hold={'mu'" in repr(other) and repr(other).endswith("optim=…)")


def test_a_fit_shows_its_parameters():
    y = (2.0 + 1.4 * np.random.default_rng(1).normal(size=100)).astype(np.float32)
    short = fitter(one_level).run(random.key(0), y, num_steps=3, num_samples=2, warmup=1, progress_bar=False)
    assert "<pre>parameters (2 scalars):" in short._repr_html_() and "Fit(3 steps" in short._repr_html_()
    fit = fitter(one_level).run(random.key(0), y, progress_bar=False)
    assert "arrived after" in fit._repr_html_() and "std error" in fit._repr_html_()
