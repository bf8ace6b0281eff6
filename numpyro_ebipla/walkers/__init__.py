r"""Ways to keep prior walkers, which estimate ``E_{p_α}[∇_α U]``, the gradient of ``−log Z``.

===================== ======================================================================  ============
strategy              a training step                                                         right at
===================== ======================================================================  ============
:class:`Persistent`   moves the walkers once; unweighted (EBIPLA, PCD) or with Jarzynski       slow energies;
                      weights and resampling (2305.19414)                                      every step
:class:`Annealed`     anneals a fresh population from the base by sequential Monte Carlo       every step
:class:`.Tempered`    moves and swaps persistent replicas between the base and the prior       slow energies
                      (parallel tempering), the hottest ones redrawn exactly                   on any shape
:class:`.ShortRun`    restarts from the base and makes K moves (LEBM)                          K → ∞
:class:`.Contrastive` restarts at the particles, or at the data, and makes K moves (CD-k)      K → ∞
===================== ======================================================================  ============

Each is a final, frozen set of options of :class:`.AbstractWalkers`, with a state of its own: ``init`` makes it,
``prepare`` gives the walkers and weights that enter the step's gradient, ``advance`` lets them follow the parameters
from ``θ_k`` to ``θ_{k+1}``.
"""

from numpyro_ebipla.walkers.annealed import Annealed
from numpyro_ebipla.walkers.base import AbstractWalkers, Walkers
from numpyro_ebipla.walkers.persistent import Persistent
from numpyro_ebipla.walkers.restarted import Contrastive, ShortRun
from numpyro_ebipla.walkers.tempered import Ladder, Tempered

__all__ = [
    "AbstractWalkers",
    "Annealed",
    "Contrastive",
    "Ladder",
    "Persistent",
    "ShortRun",
    "Tempered",
    "Walkers",
]
