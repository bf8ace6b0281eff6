"""Maximum marginal likelihood for NumPyro models with energy-based priors, by interacting particles."""

from numpyro_ebipla._errors import CheckpointError, EBIPLAWarning, ModelError
from numpyro_ebipla.ebipla import EBIPLA
from numpyro_ebipla.energy import EnergyPrior
from numpyro_ebipla.kernels import MALA, ULA, Underdamped
from numpyro_ebipla.optim import langevin_noise
from numpyro_ebipla.result import Fit
from numpyro_ebipla.tempering import Tempered
from numpyro_ebipla.walkers import Annealed, Persistent

__version__ = "0.1.0"

__all__ = [
    "EBIPLA",
    "MALA",
    "ULA",
    "Annealed",
    "CheckpointError",
    "EBIPLAWarning",
    "EnergyPrior",
    "Fit",
    "ModelError",
    "Persistent",
    "Tempered",
    "Underdamped",
    "langevin_noise",
]
