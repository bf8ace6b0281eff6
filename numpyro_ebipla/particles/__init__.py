"""Posterior particles: N for each datum (local latents) or N in all (global ones), and ways to keep them.

===============================  =======================================================================
:class:`Particles`               persistent: moved once or a few times at each step (EBIPLA, IPLA, PGD)
:class:`ShortRunParticles`       restarted from the prior's base at every step (LEBM)
:class:`SuccessiveParticles`     successive states of a single chain (SOUL)
:class:`.WeightedParticles`      persistent with Jarzynski weights (JALA-EM)
===============================  =======================================================================

Each is a final, frozen set of options of :class:`.AbstractParticles`: ``prepare`` makes what enters the step's gradient
at ``θ_k``, ``advance`` moves the particles on.
"""

from numpyro_ebipla.particles.base import AbstractParticles
from numpyro_ebipla.particles.block import Block, Prepared
from numpyro_ebipla.particles.persistent import Particles
from numpyro_ebipla.particles.restarted import ShortRunParticles, SuccessiveParticles
from numpyro_ebipla.particles.weighted import WeightedParticles

__all__ = [
    "AbstractParticles",
    "Block",
    "Particles",
    "Prepared",
    "ShortRunParticles",
    "SuccessiveParticles",
    "WeightedParticles",
]
