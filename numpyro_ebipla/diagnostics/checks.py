"""A diagnostic with its threshold, what it means in words, and what to change."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MORE_STEPS = "more num_steps (run(init_state=fit.state) goes on)"
MORE_DRAWS = "larger num_particles or num_samples"


class Check(NamedTuple):
    """One diagnostic.

    Attributes:
        name: what was looked at, with its site if it has one.
        value: the figure.
        limit: what it should be, in words.
        passed: whether it is.
        verdict: what the figure means.
        remedy: what to change if it is off.
    """

    name: str
    value: float
    limit: str
    passed: bool
    verdict: str
    remedy: str


@dataclass(frozen=True)
class Diagnostics:
    """What :meth:`.Fit.diagnostics` found; printed, a table.

    >>> print(Diagnostics((at_most("x: R-hat", 1.3, 1.1, ("chains agree", "chains disagree"), "warmup=500"),)))
    check      value  limit        verdict
    x: R-hat     1.3  at most 1.1  CHECK: chains disagree. Try warmup=500.
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is off."""
        return all(check.passed for check in self.checks)

    @property
    def warnings(self) -> list[str]:
        """A sentence for each check that failed."""
        said = "{c.name} is {c.value:.3g}, should be {c.limit}: {c.verdict}. Try {c.remedy}."
        return [said.format(c=check) for check in self.checks if not check.passed]

    def __getitem__(self, name: str) -> Check:
        """The check of this name."""
        found = {check.name: check for check in self.checks}
        if name not in found:
            raise KeyError(f"there is no check {name!r}; there are {list(found)}.")
        return found[name]

    def __str__(self) -> str:
        rows = [("check", "value", "limit", "verdict")]
        for c in self.checks:
            said = f"ok: {c.verdict}" if c.passed else f"CHECK: {c.verdict}. Try {c.remedy}."
            rows.append((c.name, f"{c.value:.3g}", c.limit, said))
        wide = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(f"{a:{wide[0]}}  {b:>{wide[1]}}  {c:{wide[2]}}  {d}" for a, b, c, d in rows)


def at_most(
    name: str,
    value: float,
    limit: float,
    verdicts: tuple[str, str],
    remedy: str,
    slack: float = 0.0,
    most_slack: float = np.inf,
) -> Check:
    """A check that ``value ≤ limit + slack``; the slack is for the figure's own Monte Carlo error.

    One that would need more slack than ``most_slack`` has failed, too: it says nothing.
    """
    passed = bool(value <= limit + slack)  # NaN fails
    shown = f"at most {limit:.3g}" + (f" (+ {slack:.2g} of noise)" if slack > 0.1 * limit else "")
    if passed and slack > most_slack:
        return Check(name, float(value), shown, False, "the particles' noise hides how much it is", MORE_DRAWS)
    return Check(name, float(value), shown, passed, verdicts[not passed], remedy)


def at_least(name: str, value: float, limit: float, verdicts: tuple[str, str], remedy: str) -> Check:
    """A check that ``value ≥ limit``."""
    passed = bool(value >= limit)
    return Check(name, float(value), f"at least {limit:.3g}", passed, verdicts[not passed], remedy)
