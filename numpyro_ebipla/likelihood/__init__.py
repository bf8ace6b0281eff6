r"""Log densities of data, ``log p_θ(y)``, by sequential Monte Carlo from the prior to each posterior.

A population annealed from the base ``p_0`` to the posterior of a datum gives an unbiased estimate of
``∫ p_0(x) e^{−E(x)} p(y | x) dx`` (Neal, 2001; Del Moral et al., 2006); what is missing to ``p(y)`` is the normaliser
of the energy, ``log Z``, which an anneal of its own gives. The log of the populations' mean is corrected for half its
variance, by which the log of an unbiased estimate is too low.
"""

from numpyro_ebipla.likelihood.annealed import LogLikelihood
from numpyro_ebipla.likelihood.bidirectional import Bounds

__all__ = [
    "Bounds",
    "LogLikelihood",
]
