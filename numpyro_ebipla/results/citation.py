"""What to cite of a fit: the sources of the parts that it was composed of, in BibTeX."""

from collections.abc import Iterable
from typing import NamedTuple

from numpyro_ebipla.kernels.base import AbstractKernel
from numpyro_ebipla.kernels.langevin import Underdamped
from numpyro_ebipla.kernels.mala import MALA
from numpyro_ebipla.particles.base import AbstractParticles
from numpyro_ebipla.particles.persistent import Particles
from numpyro_ebipla.particles.restarted import ShortRunParticles, SuccessiveParticles
from numpyro_ebipla.particles.weighted import WeightedParticles
from numpyro_ebipla.training.config import Config
from numpyro_ebipla.walkers.annealed import Annealed
from numpyro_ebipla.walkers.base import AbstractWalkers
from numpyro_ebipla.walkers.persistent import Persistent
from numpyro_ebipla.walkers.restarted import Contrastive, ShortRun
from numpyro_ebipla.walkers.tempered import Tempered


class Source(NamedTuple):
    """A publication; ``where`` is an arXiv number, or the name of a journal (with its volume) or a conference."""

    authors: str
    year: int
    title: str
    where: str
    volume: int | None = None

    def bibtex(self, name: str) -> str:
        """Return the entry of that name."""
        fields = {"author": self.authors, "year": self.year, "title": f"{{{self.title}}}"}
        if self.where[0].isdigit():
            kind = "misc"
            fields |= {"eprint": self.where, "archiveprefix": "arXiv"}
        elif self.volume is None:
            kind = "inproceedings"
            fields |= {"booktitle": self.where}
        else:
            kind = "article"
            fields |= {"journal": self.where, "volume": self.volume}
        lines = [f"  {field} = {{{value}}}," for field, value in fields.items()]
        return "\n".join([f"@{kind}{{{name},", *lines, "}"])


SOFTWARE = "@software{numpyro_ebipla,\n  author = {{The numpyro_ebipla contributors}},\n  title = {numpyro_ebipla},\n}"

SOURCES = {
    "akyildiz2023": Source(
        "Akyildiz, O. Deniz and Crucinio, Francesca Romana and Girolami, Mark and Johnston, Tim and Sabanis, Sotirios",
        2023,
        "Interacting Particle Langevin Algorithm for Maximum Marginal Likelihood Estimation",
        "2303.13429",
    ),
    "carbone2023": Source(
        "Carbone, Davide and Hua, Mengjian and Coste, Simon and Vanden-Eijnden, Eric",
        2023,
        "Efficient Training of Energy-Based Models Using Jarzynski Equality",
        "2305.19414",
    ),
    "cheng2018": Source(
        "Cheng, Xiang and Chatterji, Niladri S. and Bartlett, Peter L. and Jordan, Michael I.",
        2018,
        "Underdamped Langevin MCMC: A Non-Asymptotic Analysis",
        "Conference on Learning Theory",
    ),
    "cuin2025": Source(
        "Cuin, James and Carbone, Davide and Akyildiz, O. Deniz",
        2025,
        "Learning Latent Variable Models via Jarzynski-adjusted Langevin Algorithm",
        "2505.18427",
    ),
    "debortoli2021": Source(
        "De Bortoli, Valentin and Durmus, Alain and Pereyra, Marcelo and Vidal, Ana F.",
        2021,
        "Efficient Stochastic Optimisation by Unadjusted Langevin Monte Carlo",
        "Statistics and Computing",
        31,
    ),
    "delmoral2006": Source(
        "Del Moral, Pierre and Doucet, Arnaud and Jasra, Ajay",
        2006,
        "Sequential Monte Carlo Samplers",
        "Journal of the Royal Statistical Society: Series B",
        68,
    ),
    "hinton2002": Source(
        "Hinton, Geoffrey E.",
        2002,
        "Training Products of Experts by Minimizing Contrastive Divergence",
        "Neural Computation",
        14,
    ),
    "kuntz2022": Source(
        "Kuntz, Juan and Lim, Jen Ning and Johansen, Adam M.",
        2022,
        "Particle Algorithms for Maximum Likelihood Training of Latent Variable Models",
        "2204.12965",
    ),
    "marks2025": Source(
        "Marks, Joanna and Wang, Tim Y. J. and Akyildiz, O. Deniz",
        2025,
        "Learning Latent Energy-Based Models via Interacting Particle Langevin Dynamics",
        "2510.12311",
    ),
    "oliva2024": Source(
        "Valsecchi Oliva, Paul Felix and Akyildiz, O. Deniz",
        2024,
        "Kinetic Interacting Particle Langevin Monte Carlo",
        "2407.05790",
    ),
    "pang2020": Source(
        "Pang, Bo and Han, Tian and Nijkamp, Erik and Zhu, Song-Chun and Wu, Ying Nian",
        2020,
        "Learning Latent Space Energy-Based Prior Model",
        "2006.08205",
    ),
    "syed2022": Source(
        "Syed, Saifuddin and Bouchard-C{\\^o}t{\\'e}, Alexandre and Deligiannidis, George and Doucet, Arnaud",
        2022,
        "Non-Reversible Parallel Tempering: A Scalable Highly Parallel MCMC Scheme",
        "Journal of the Royal Statistical Society: Series B",
        84,
    ),
    "tieleman2008": Source(
        "Tieleman, Tijmen",
        2008,
        "Training Restricted Boltzmann Machines Using Approximations to the Likelihood Gradient",
        "International Conference on Machine Learning",
    ),
    "titsias2023": Source(
        "Titsias, Michalis K.",
        2023,
        "Optimal Preconditioning and Fisher Adaptive Langevin Sampling",
        "2305.14442",
    ),
}

#: What each strategy goes back to; those whose settings decide are in the functions below.
_OF_STRATEGY: dict[type, str] = {
    WeightedParticles: "cuin2025",
    ShortRunParticles: "pang2020",
    SuccessiveParticles: "debortoli2021",
    Tempered: "syed2022",
    Annealed: "delmoral2006",
    ShortRun: "pang2020",
    Contrastive: "hinton2002",
}


def sources_of(particles: AbstractParticles | None, walkers: Iterable[AbstractWalkers]) -> dict[str, Source]:
    """Return the sources of a system, by name; those of a strategy of the user's own are the user's to add.

    Args:
        particles: how the latents are kept, None where a model has none.
        walkers: how the walkers of the energy priors are kept.
    """
    walkers = list(walkers)
    names = [] if particles is None else _of_particles(particles, with_energy=bool(walkers))
    names += [name for strategy in walkers for name in _of_walkers(strategy)]
    names += [] if particles is None else _of_kernel(particles.kernel)
    return {name: SOURCES[name] for name in dict.fromkeys(names)}


def bibtex_of(config: Config) -> str:
    """Return what :meth:`.Fit.citation` does."""
    particles = config.particles if config.model.latents else None
    sources = sources_of(particles, config.walkers.values())
    return "\n\n".join([SOFTWARE, *(source.bibtex(name) for name, source in sources.items())])


def _of_particles(particles: AbstractParticles, with_energy: bool) -> list[str]:
    if type(particles) is Particles:
        return ["marks2025"] if with_energy else ["akyildiz2023", "kuntz2022"]
    return _of_strategy(particles)


def _of_walkers(walkers: AbstractWalkers) -> list[str]:
    if type(walkers) is Persistent:
        return ["carbone2023" if walkers.weighted else "tieleman2008"]
    return _of_strategy(walkers)


def _of_strategy(strategy: AbstractParticles | AbstractWalkers) -> list[str]:
    source = _OF_STRATEGY.get(type(strategy))
    return [] if source is None else [source]


def _of_kernel(kernel: AbstractKernel) -> list[str]:
    if isinstance(kernel, Underdamped):
        return ["oliva2024", "cheng2018"]
    return ["titsias2023"] if isinstance(kernel, MALA) and kernel.precondition else []
