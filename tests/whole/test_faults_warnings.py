"""Warnings in proportion: what is a little above its threshold is not "wrong"."""

from types import SimpleNamespace

import numpy as np
import pytest

from numpyro_ebipla import EBIPLAWarning
from numpyro_ebipla.diagnostics import report
from numpyro_ebipla.diagnostics.checks import Diagnostics, Rule
from numpyro_ebipla.diagnostics.parameters import LEFT
from numpyro_ebipla.diagnostics.run import ACCEPTANCE, ESS, FINITE_STEPS, R_HAT

#: A figure, its noise, and whether it is off, and by little.
JUDGED = [
    (LEFT, 0.0049, 0.0, True, False),
    (LEFT, 0.0056, 0.0, False, True),  # "the fit may be wrong"
    (LEFT, 0.011, 0.0, False, False),
    (LEFT, 0.0149, 0.005, False, True),  # above what noise explains, by less than the noise
    (LEFT, 0.0151, 0.005, False, False),
    (LEFT, np.nan, 0.0, False, False),
    (R_HAT, 1.15, 0.0, False, True),
    (R_HAT, 1.3, 0.0, False, False),
    (ESS, 40, 0.0, False, True),
    (ESS, 20, 0.0, False, False),
    (ACCEPTANCE, 0.2, 0.0, False, True),
    (ACCEPTANCE, 0.0, 0.0, False, False),
    (FINITE_STEPS, 1, 0.0, False, False),
]


@pytest.mark.unit
@pytest.mark.parametrize(("rule", "value", "slack", "passed", "slight"), JUDGED)
def test_faults_figures_off_by_little(rule: Rule, value, slack, passed, slight):
    check = rule.judge(value, slack=slack)
    assert (check.passed, check.slight) == (passed, slight)
    found = Diagnostics((check,))
    assert found.slight == (passed or slight)
    assert ("slightly off" in str(found)) == slight == any("slightly off: it should be" in w for w in found.warnings)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("values", "begins"),
    [
        ([0.0056], "figures of the fit are slightly off"),
        ([0.05], "the fit may be wrong"),
        ([0.0056, 0.05], "the fit may be wrong"),
    ],
)
def test_faults_warnings_in_proportion(monkeypatch, values, begins):
    monkeypatch.setattr(report, "check_run", lambda fit: [LEFT.judge(value) for value in values])
    monkeypatch.setattr(report, "_weights_alive", lambda fit, batch: [])
    monkeypatch.setattr(report, "_batch", lambda fit, key: None)
    config = SimpleNamespace(model=SimpleNamespace(energies={"x": None}))
    with pytest.warns(EBIPLAWarning, match=f"^{begins}, see fit.diagnostics"):
        report.warn_of_run(SimpleNamespace(losses=np.zeros(1000), num_samples=100, config=config))
