"""Maximum marginal likelihood for NumPyro models with energy-based priors, by interacting particles."""

from numpyro_ebipla._core.errors import CheckpointError, EBIPLAWarning, ModelError
from numpyro_ebipla.ebipla import EBIPLA
from numpyro_ebipla.kernels.langevin import ULA, Underdamped
from numpyro_ebipla.kernels.mala import MALA
from numpyro_ebipla.model.energy import EnergyPrior
from numpyro_ebipla.model.missing import nan_masked
from numpyro_ebipla.optim.langevin import kinetic_langevin, langevin, langevin_noise
from numpyro_ebipla.particles.persistent import Particles
from numpyro_ebipla.particles.restarted import ShortRunParticles, SuccessiveParticles
from numpyro_ebipla.particles.weighted import WeightedParticles
from numpyro_ebipla.results.estimates import compare
from numpyro_ebipla.results.fit import Fit
from numpyro_ebipla.smc.annealing import Annealing
from numpyro_ebipla.walkers.annealed import Annealed
from numpyro_ebipla.walkers.persistent import Persistent
from numpyro_ebipla.walkers.restarted import Contrastive, ShortRun
from numpyro_ebipla.walkers.tempered import Tempered

__version__ = "0.1.0"

__all__ = [
    "EBIPLA",
    "MALA",
    "ULA",
    "Annealed",
    "Annealing",
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
    "compare",
    "kinetic_langevin",
    "langevin",
    "langevin_noise",
    "nan_masked",
]
