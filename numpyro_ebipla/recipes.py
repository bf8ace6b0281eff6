"""The systems of the papers, each as a configured :class:`.EBIPLA`.

All are settings of one algorithm: how posterior particles are kept, how prior walkers are kept, and how the
parameters move. ``recipes.lebm(model)`` has the defaults of its paper; keyword arguments of ``EBIPLA`` override them.

>>> from numpyro_ebipla import recipes
>>> print(recipes.table().splitlines()[0])
| recipe | source | posterior particles | prior walkers | parameter move |

A recipe refuses, by a :class:`.ModelError` before any long work, a model that its paper cannot fit.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optax

from numpyro_ebipla.ebipla import EBIPLA
from numpyro_ebipla.kernels.langevin import ULA, Underdamped
from numpyro_ebipla.kernels.mala import MALA
from numpyro_ebipla.model.latent_model import LatentModel
from numpyro_ebipla.optim.langevin import kinetic_langevin, langevin
from numpyro_ebipla.particles.base import AbstractParticles
from numpyro_ebipla.particles.persistent import Particles
from numpyro_ebipla.particles.restarted import ShortRunParticles, SuccessiveParticles
from numpyro_ebipla.particles.weighted import WeightedParticles
from numpyro_ebipla.walkers.base import AbstractWalkers
from numpyro_ebipla.walkers.persistent import Persistent
from numpyro_ebipla.walkers.restarted import Contrastive, ShortRun

Refusal = Callable[[LatentModel], str | None]

#: Passive walkers for each that moves the parameters, in :func:`jarzynski_ebm`: as few gave masses of 0.25 to 0.36
#: for 0.30, four times as many 0.29 to 0.32.
PASSIVE = 4

#: ``{name: (recipe, source, parameter move)}``, for :func:`table`.
_RECIPES: dict[str, tuple[Callable, str, str]] = {}


def _recipe(source: str, parameters: str) -> Callable:
    def register(recipe: Callable) -> Callable:
        _RECIPES[recipe.__name__] = (recipe, source, parameters)
        return recipe

    return register


@_recipe("2510.12311", "gradient step with noise")
def ebipla(model: Callable, *, step_size: float = 1e-2, num_walkers: int = 1000, **overrides: Any) -> EBIPLA:
    """Make EBIPLA as in its paper (2510.12311, eqs. 8–10): one step for all three families, with noise.

    To study or reproduce the paper; for a fit prefer ``EBIPLA(model)``, whose moves are adjusted and adapted.

    Args:
        model: a NumPyro model.
        step_size: ``h`` of all three.
        num_walkers: P.
        **overrides: arguments of :class:`.EBIPLA`. Defaults here: ``num_particles=10``.

    Raises:
        ModelError: if the model has no energy prior (see :func:`ipla`).
    """
    return _make(
        model,
        overrides,
        _needs_energy("ebipla", "recipes.ipla"),
        num_particles=10,
        posterior=Particles(ULA(step_size)),
        prior=Persistent(num_walkers, ULA(step_size)),
        optim=langevin(step_size),
        averaging=None,
    )


@_recipe("2303.13429", "gradient step with noise")
def ipla(model: Callable, *, step_size: float = 1e-3, **overrides: Any) -> EBIPLA:
    """Make IPLA (2303.13429, Alg. 1): persistent ULA particles, noise on the parameters.

    The noise regularises the path and gives the method its convergence rate in N; the estimate is random, with variance
    ``1/N`` of a posterior's. Prefer it where its theory is wanted, or where the noise helps out of a flat start;
    :func:`pgd` is the same without it, and steadier.

    Args:
        model: a NumPyro model.
        step_size: ``h``, of the sum over the data.
        **overrides: arguments of :class:`.EBIPLA`. Defaults here: ``num_particles=50``.

    Raises:
        ModelError: if the model has an energy prior (see :func:`ebipla`).
    """
    return _without_energy("ipla", model, overrides, Particles(ULA(step_size)), langevin(step_size, whole=True))


@_recipe("2204.12965", "gradient step")
def pgd(model: Callable, *, step_size: float = 1e-3, **overrides: Any) -> EBIPLA:
    """Make particle gradient descent (2204.12965, eq. 9): persistent ULA particles, gradient steps on the parameters.

    The simplest of all, for normalised priors and well-scaled models; it diverges above a critical step.

    Args:
        model: a NumPyro model.
        step_size: ``h``, of the sum over the data.
        **overrides: arguments of :class:`.EBIPLA`. Defaults here: ``num_particles=50``.

    Raises:
        ModelError: if the model has an energy prior (see :func:`ebipla`).
    """
    move = langevin(step_size, noise=False, whole=True)
    return _without_energy("pgd", model, overrides, Particles(ULA(step_size)), move)


@_recipe("De Bortoli et al., 2021", "gradient step")
def soul(model: Callable, *, step_size: float = 1e-3, rate: float | None = None, **overrides: Any) -> EBIPLA:
    """Make SOUL (De Bortoli et al., 2021, Alg. 1): one unadjusted chain, N moves a step.

    A gradient step takes the mean over these N states. It costs as many gradients as N particles do, one after another:
    prefer it where memory holds one particle only, or as the baseline of particle methods.

    Args:
        model: a NumPyro model.
        step_size: ``h`` of the chain.
        rate: of the parameters, of the sum over the data; by default ``h``.
        **overrides: arguments of :class:`.EBIPLA`. Defaults here: ``num_particles=50``, which is N.

    Raises:
        ModelError: if the model has an energy prior (see :func:`ebipla`).
    """
    move = langevin(step_size if rate is None else rate, noise=False, whole=True)
    return _without_energy("soul", model, overrides, SuccessiveParticles(ULA(step_size)), move)


@_recipe("2407.05790", "underdamped, with noise")
def kiplmc(model: Callable, *, step_size: float = 1e-2, friction: float = 2.0, **overrides: Any) -> EBIPLA:
    """Make KIPLMC1 (2407.05790, Alg. 1): particles and parameters move by underdamped Langevin.

    Prefer it to :func:`ipla` where the posterior is badly conditioned, as momentum pays there; steps are of the order
    of ``√h`` of :func:`ipla`.

    Args:
        model: a NumPyro model.
        step_size: ``h`` of particles and parameters.
        friction: ``γ`` of both.
        **overrides: arguments of :class:`.EBIPLA`. Defaults here: ``num_particles=50``.

    Raises:
        ModelError: if the model has an energy prior (see :func:`ebipla`).
    """
    particles = Particles(Underdamped(step_size, friction))
    return _without_energy("kiplmc", model, overrides, particles, kinetic_langevin(step_size, friction, whole=True))


@_recipe("2505.18427", "gradient step")
def jala_em(model: Callable, *, step_size: float = 1e-3, threshold: float = 0.5, **overrides: Any) -> EBIPLA:
    """Make JALA-EM (2505.18427, Alg. 1): weighted ULA particles, resampled where the ESS is low.

    The weights make the posterior exact at every step and give ``fit.log_marginal_likelihood()``: for model selection.

    Args:
        model: a NumPyro model.
        step_size: ``h``, of particles and (times M) parameters; the paper's optimiser is ``optim=``.
        threshold: of the ESS, as a fraction of N.
        **overrides: arguments of :class:`.EBIPLA`. Defaults here: ``num_particles=50``.

    Raises:
        ModelError: if the model has an energy prior, or global latents and subsampled data.
    """

    def subsampled(layout: LatentModel) -> str | None:
        if layout.subsampled and layout.global_sites:
            return (
                f"recipes.jala_em: '{layout.global_sites[0]}' is a global latent, whose weights need all data at every "
                "step: drop batch_size, or use recipes.ipla(model)."
            )
        return None

    particles = WeightedParticles(ULA(step_size), threshold=threshold)
    move = langevin(step_size, noise=False, whole=True)
    return _without_energy("jala_em", model, overrides, particles, move, subsampled)


@_recipe("2006.08205", "Adam, energy slower")
def lebm(model: Callable, **overrides: Any) -> EBIPLA:
    """Make LEBM (2006.08205, Alg. 1): short-run chains from ``p_0`` for posterior and prior.

    Moves and steps are the paper's: 20 of ``0.1²/2`` and 60 of ``0.4²/2``, Adam (β₁ = 0.5) at 2e-5 for the energy and
    1e-4 for the rest, N = 1. As the baseline it is; ``EBIPLA(model)`` needs fewer gradients for a better prior.

    Args:
        model: a NumPyro model.
        **overrides: arguments of :class:`.EBIPLA`.

    Raises:
        ModelError: if the model has no energy prior over a latent.
    """

    def refuse(layout: LatentModel) -> str | None:
        if layout.energies and not layout.latents:
            return "recipes.lebm fits latent energy priors, and this model has no latent: use recipes.pcd(model)."
        return _needs_energy("lebm", "recipes.pgd")(layout)

    return _make(
        model,
        overrides,
        refuse,
        num_particles=1,
        posterior=ShortRunParticles(),
        prior=ShortRun(),
        optim={"energy": optax.adam(2e-5, b1=0.5), "rest": optax.adam(1e-4, b1=0.5)},
        averaging=None,
    )


@_recipe("Tieleman, 2008", "the default")
def pcd(model: Callable, *, num_walkers: int = 1000, num_moves: int = 1, **overrides: Any) -> EBIPLA:
    """Make persistent contrastive divergence (Tieleman, 2008): persistent unweighted walkers.

    Fast, and wrong where walkers do not mix: masses of modes are lost without a sign of it (2305.19414). Prefer it for
    slow trainings of unimodal energies, or as the baseline that it is.

    Args:
        model: a NumPyro model, with or without latents.
        num_walkers: P.
        num_moves: moves of the walkers per step, by MALA.
        **overrides: arguments of :class:`.EBIPLA`. Defaults here: its own particles and optimiser.

    Raises:
        ModelError: if the model has no energy prior.
    """
    walkers = Persistent(num_walkers, MALA(), num_moves)
    return _make(model, overrides, _needs_energy("pcd", "recipes.pgd"), prior=walkers)


@_recipe("Hinton, 2002", "the default")
def cd(
    model: Callable, *, num_moves: int = 1, num_walkers: int = 256, reset_every: int = 1, **overrides: Any
) -> EBIPLA:
    """Make CD-k (Hinton, 2002): walkers restarted at the data, or at the posterior particles.

    Biased, as its walkers never leave the data's neighbourhood: modes there, their masses unlearned (2305.19414).
    Prefer it for a cheap start of an energy that another recipe goes on with, or as the baseline that it is.

    Args:
        model: a NumPyro model, with or without latents.
        num_moves: k.
        num_walkers: P.
        reset_every: steps between two restarts.
        **overrides: arguments of :class:`.EBIPLA`. Defaults here: its own particles and optimiser.

    Raises:
        ModelError: if the model has no energy prior.
        ValueError: if ``prior`` is overridden by walkers that do not start at the data.
    """
    chosen = overrides.get("prior")
    for strategy in chosen.values() if isinstance(chosen, dict) else [chosen]:
        if isinstance(strategy, AbstractWalkers) and not strategy.follows_particles:
            raise ValueError(
                f"recipes.cd starts its walkers at the data, {type(strategy).__name__} does not: use "
                "prior=Contrastive(...), or recipes.pcd(model)."
            )
    walkers = Contrastive(num_walkers, MALA(), num_moves, reset_every)
    return _make(model, overrides, _needs_energy("cd", "recipes.pgd"), prior=walkers)


@_recipe("2305.19414", "the default")
def jarzynski_ebm(
    model: Callable,
    *,
    step_size: float | None = None,
    num_walkers: int = 1000,
    threshold: float = 0.5,
    num_passive: int | None = None,
    **overrides: Any,
) -> EBIPLA:
    """Make Jarzynski-corrected training of an EBM (2305.19414, Alg. 1): weighted persistent walkers.

    Consistent gradients at any speed as long as the ESS holds, and log Z, hence the cross-entropy, at every step. In
    the paper the walkers that move the parameters also estimate log Z, which biases it low by about
    rate · Var(∇U) / ESS per step, and with it the masses of modes. Here passive walkers estimate it, and the others
    are drawn anew from them, see :class:`.Persistent`. The paper's own is ``step_size=1e-2, num_passive=0``.

    Args:
        model: a NumPyro model with observed energy sites and no latents.
        step_size: ``h`` of the paper's unadjusted moves, which the weights correct as well; by default the moves are
            MALA's, with a step of their own, as slow walkers make noisy weights.
        num_walkers: P.
        threshold: of the ESS, as a fraction of P.
        num_passive: walkers that have no part in the gradient; None for four times ``num_walkers``, which knows a mass
            of one half to about 0.01.
        **overrides: arguments of :class:`.EBIPLA`.

    Raises:
        ModelError: if the model has latents, or no energy.
    """

    def refuse(layout: LatentModel) -> str | None:
        if layout.latents:
            return (
                f"recipes.jarzynski_ebm fits energies of the data, and this model has the latent "
                f"'{next(iter(layout.latents))}': use EBIPLA(model, prior=Persistent(weighted=True))."
            )
        return _needs_energy("jarzynski_ebm", "recipes.pgd")(layout)

    passive = PASSIVE * num_walkers if num_passive is None else num_passive
    kernel = MALA() if step_size is None else ULA(step_size)
    walkers = Persistent(num_walkers, kernel, weighted=True, threshold=threshold, num_passive=passive)
    return _make(model, overrides, refuse, prior=walkers)


def table() -> str:
    """Return all recipes against their columns, in Markdown, read off the systems that they make."""
    head = ("recipe", "source", "posterior particles", "prior walkers", "parameter move")
    rows = [head, ("---",) * len(head)]
    for name, (recipe, source, parameters) in _RECIPES.items():
        system = recipe(lambda: None)
        particles = "– (observed)" if recipe is jarzynski_ebm else _described(system.posterior)
        walkers = "–" if system.prior is None else _described(system.prior)
        rows.append((f"`{name}`", source, particles, walkers, parameters))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# --- parts --------------------------------------------------------------------------------------------


def _make(model: Callable, overrides: dict[str, Any], refuse: Refusal, **defaults: Any) -> EBIPLA:
    if "refuse" in overrides:
        raise TypeError(
            "refuse is the recipe's own, by what its paper can fit: use EBIPLA(model, refuse=…) for another."
        )
    if "posterior" in defaults and "posterior" not in overrides:  # which stays the paper's but for these
        own = {name: overrides.pop(name, None) for name in ("kernel", "num_moves")}
        own = {name: value for name, value in own.items() if value is not None}
        defaults["posterior"] = replace(defaults["posterior"], **own)
    return EBIPLA(model, refuse=refuse, **{**defaults, **overrides})


def _needs_energy(name: str, instead: str) -> Refusal:
    def refuse(layout: LatentModel) -> str | None:
        if not layout.energies:
            return f"recipes.{name} needs an EnergyPrior, and this model has none: use {instead}(model)."
        return None

    return refuse


def _without_energy(
    name: str,
    model: Callable,
    overrides: dict[str, Any],
    posterior: AbstractParticles,
    optim: Any,
    also: Refusal | None = None,
) -> EBIPLA:
    """Make a system for normalised priors only."""

    def refuse(layout: LatentModel) -> str | None:
        if layout.energies:
            return (
                f"recipes.{name} has no walkers, and '{next(iter(layout.energies))}' has an energy prior, whose "
                "normaliser needs them: use recipes.ebipla(model), or EBIPLA(model)."
            )
        return also(layout) if also else None

    defaults = {"num_particles": 50, "averaging": None}
    return _make(model, overrides, refuse, posterior=posterior, optim=optim, **defaults)


def _described(strategy: Any) -> str:
    """Return a strategy as a cell of the table."""
    text = f"{type(strategy).__name__}, {type(strategy.kernel).__name__}"
    if strategy.num_moves > 1:
        text += f", {strategy.num_moves} moves"
    return text + (", weighted" if getattr(strategy, "weighted", False) else "")
