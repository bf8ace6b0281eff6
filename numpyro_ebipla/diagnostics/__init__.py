"""Is a fit to be trusted? Checks with a threshold, a verdict in words and the argument to change.

What the walkers or the contrast say of themselves is not enough: walkers can look right while the prior itself has
gone wrong. So the parameters are judged in nats (:mod:`~numpyro_ebipla.diagnostics.parameters`), and an energy prior by
draws and a log Z of its own (:mod:`~numpyro_ebipla.diagnostics.prior`).
"""

from numpyro_ebipla.diagnostics.checks import Check, Diagnostics

__all__ = [
    "Check",
    "Diagnostics",
]
