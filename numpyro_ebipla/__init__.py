"""Maximum marginal likelihood for NumPyro models with energy-based priors, by interacting particles."""

from numpyro_ebipla._errors import CheckpointError, EBIPLAWarning, ModelError
from numpyro_ebipla.ebipla import EBIPLA
from numpyro_ebipla.energy import EnergyPrior
from numpyro_ebipla.kernels import MALA, ULA, Underdamped
from numpyro_ebipla.missing import nan_masked
from numpyro_ebipla.optim import kinetic_langevin, langevin, langevin_noise
from numpyro_ebipla.particles import Particles, ShortRunParticles, SuccessiveParticles
from numpyro_ebipla.restarted import Contrastive, ShortRun
from numpyro_ebipla.result import Fit
from numpyro_ebipla.tempering import Tempered
from numpyro_ebipla.walkers import Annealed, Persistent
from numpyro_ebipla.weighted import WeightedParticles

__version__ = "0.1.0"

__all__ = [
    "EBIPLA",
    "MALA",
    "ULA",
    "Annealed",
    "CheckpointError",
    "Contrastive",
    "EBIPLAWarning",
    "EnergyPrior",
    "Fit",
    "ModelError",
    "Particles",
    "Persistent",
    "ShortRun",
    "ShortRunParticles",
    "SuccessiveParticles",
    "Tempered",
    "Underdamped",
    "WeightedParticles",
    "kinetic_langevin",
    "langevin",
    "langevin_noise",
    "nan_masked",
]
