"""A diagnostic with its threshold, what it means in words, and what to change."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from numpyro_ebipla._core.show import html_table

MORE_STEPS = "more num_steps (run(init_state=fit.state) goes on)"
MORE_DRAWS = "larger num_particles or num_samples"
#: Share of a limit from which a noise is worth saying.
SAID_FROM = 0.1


class Check(NamedTuple):
    """One diagnostic.

    Attributes:
        name: what was looked at, with its site if it has one.
        value: the figure.
        limit: what it should be, in words.
        passed: whether it is.
        verdict: what the figure means.
        remedy: what to change if it is off.
        slight: whether it is off by little, or by no more than its noise.
    """

    name: str
    value: float
    limit: str
    passed: bool
    verdict: str
    remedy: str
    slight: bool = False


class Rule(NamedTuple):
    """What a figure should be, and what to say of it.

    Attributes:
        name: what is looked at.
        limit: the most that the figure should be.
        good: verdict where it is.
        bad: verdict where it is not.
        remedy: what to change then.
        is_least: whether the limit is the least instead.
        most_slack: how much noise is allowed for before a figure that passes says nothing.
        slight: how many times the limit a figure may be, or what part of it, to be off by little.
    """

    name: str
    limit: float
    good: str
    bad: str
    remedy: str
    is_least: bool = False
    most_slack: float = np.inf
    slight: float = 2.0

    def judge(self, value: Any, site: str = "", slack: float = 0.0) -> Check:
        """Judge a figure.

        Args:
            value: the figure; NaN fails.
            site: to which it belongs, if any.
            slack: for the figure's own Monte Carlo error.
        """
        value, name = float(value), f"{site}: {self.name}" if site else self.name
        if self.is_least:
            passed, shown = value >= self.limit - slack, f"at least {self.limit:.3g}"
        else:
            passed, shown = value <= self.limit + slack, f"at most {self.limit:.3g}"
        if slack > SAID_FROM * self.limit:
            shown += f" (+ {slack:.2g} of noise)"
        if passed and slack > self.most_slack:
            return Check(name, value, shown, False, "the particles' noise hides how much it is", MORE_DRAWS)
        slight = value >= self.limit / self.slight if self.is_least else value <= self.limit * self.slight
        slight = bool(not passed and (slight or abs(value - self.limit) <= 2 * slack))
        return Check(name, value, shown, bool(passed), self.good if passed else self.bad, self.remedy, slight)


@dataclass(frozen=True, repr=False)
class Diagnostics:
    """What :meth:`.Fit.diagnostics` found; printed, a table.

    >>> r_hat = Rule("R-hat", 1.1, "chains agree", "chains disagree", "warmup=500", slight=1.1)
    >>> print(Diagnostics((r_hat.judge(1.3, "x"),)))
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
        said = "{c.name} is {c.value:.3g}, {off}should be {c.limit}: {c.verdict}. Try {c.remedy}."
        failed = [check for check in self.checks if not check.passed]
        return [said.format(c=check, off="slightly off: it " if check.slight else "") for check in failed]

    @property
    def slight(self) -> bool:
        """Whether all that is off is so by little."""
        return all(check.passed or check.slight for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        """Return the check of this name."""
        found = {check.name: check for check in self.checks}
        if name not in found:
            raise KeyError(f"there is no check {name!r}; there are {list(found)}.")
        return found[name]

    def __repr__(self) -> str:
        rows = self._rows()
        wide = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(f"{a:{wide[0]}}  {b:>{wide[1]}}  {c:{wide[2]}}  {d}" for a, b, c, d in rows)

    def _repr_html_(self) -> str:
        header, *rows = self._rows()
        return html_table(header, rows)

    def _rows(self) -> list[tuple[str, str, str, str]]:
        rows = [("check", "value", "limit", "verdict")]
        for c in self.checks:
            off = "slightly off" if c.slight else "CHECK"
            said = f"ok: {c.verdict}" if c.passed else f"{off}: {c.verdict}. Try {c.remedy}."
            rows.append((c.name, f"{c.value:.3g}", c.limit, said))
        return rows
