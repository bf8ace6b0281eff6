"""The toy hierarchical model of 2204.12965 (Example 1): steps around the edge of stability, against closed forms.

``x_d ~ N(θ, 1), y_d ~ N(x_d, 1)`` for d = 1 … D; the maximiser is ``ȳ`` and each posterior ``N((y_d + ȳ)/2, 1/2)``.

The paper has one latent vector of dimension D, so that its θ-gradient is the sum over d. Here each ``x_d`` is a local
latent of datum d and the recipes' steps are of the sum over the data, which is the same recursion: ULA moves every
coordinate on its own anyway. :func:`joint_model`, which has the one vector, is run as well.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from matplotlib.figure import Figure
from scipy.linalg import expm

from benchmarks.papers.paths import Walk
from benchmarks.report import Report
from numpyro_ebipla import EBIPLA, recipes


class Settings(NamedTuple):
    """``steps`` are multiples of ``1/(2 + D)``; K, N and D are the paper's in both forms."""

    num_data: int = 100
    num_particles: int = 10
    num_steps: int = 300
    repeats: int = 100
    true_theta: float = 1.0
    pgd_steps: tuple[float, ...] = (0.75, 1.5, 2.0, 2.05)
    ipla_steps: tuple[float, ...] = (0.75, 1.5)
    kiplmc_steps: tuple[float, ...] = (2.0,)
    friction: float = 2.0


REDUCED, FULL = Settings(), Settings(repeats=1000)


def model(y):
    theta = numpyro.param("theta", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(theta, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


def joint_model(y):
    theta = numpyro.param("theta", 0.0)
    x = numpyro.sample("x", dist.Normal(theta, 1).expand([len(y)]).to_event(1))
    numpyro.sample("y", dist.Normal(x, 1).to_event(1), obs=y)


def critical_step(num_data: int) -> float:
    """The largest stable h of PGD.

    The means follow ``θ += h D (x̄ − θ), x̄ += h (ȳ + θ − 2 x̄)``, a matrix ``I + h A`` with ``A = [[−D, D], [1, −2]]``
    whose eigenvalues are ``−(D + 2 ∓ √(D² + 4)) / 2``. It contracts while ``h`` times the larger one is below 2.
    The paper's 2/(2 + D) takes the trace for that eigenvalue: 1 % less for D = 100.
    """
    return 4 / (num_data + 2 + np.sqrt(num_data**2 + 4))


class Move(NamedTuple):
    """A move of one coordinate: ``state = a @ state + b force + noise of covariance q times its temperature``."""

    a: np.ndarray
    b: np.ndarray
    q: np.ndarray


def overdamped(h: float) -> Move:
    """ULA and a gradient step: the state is the position."""
    return Move(np.ones((1, 1)), np.array([h]), np.array([[2 * h]]))


def underdamped(h: float, friction: float) -> Move:
    """Position and velocity of Langevin dynamics with the force frozen over ``h``, solved by matrix exponentials.

    For a linear equation with drift A and noise C, ``exp(h [[−A, C], [0, Aᵀ]])`` holds both propagator and covariance
    (Van Loan, 1978). The package has the integrals in closed form; this is a check on them.
    """
    drift, noise = np.array([[0.0, 1.0], [0.0, -friction]]), np.diag([0.0, 2 * friction])
    block = expm(h * np.block([[-drift, noise], [np.zeros((2, 2)), drift.T]]))
    a = block[2:, 2:].T
    constant = expm(h * np.block([[drift, np.array([[0.0], [1.0]])], [np.zeros((1, 3))]]))
    return Move(a, constant[:2, 2], a @ block[:2, 2:])


def moments(s: "Settings", mean_y: float, move: Move, noise: bool) -> np.ndarray:
    """Root mean square of ``θ_k − ȳ`` for k = 0 … K, exact; ``noise`` says whether θ has any.

    The recursion of :func:`critical_step`, with the moves' noise: ``x̄`` at temperature 1/(DN), θ at 1/N.
    """
    size, num, m = s.num_data, s.num_particles, len(move.b)
    force = np.zeros((2, 2 * m))
    force[0, 0], force[0, m], force[1, 0], force[1, m] = -size, size, 1.0, -2.0
    step = np.kron(np.eye(2), move.a) + np.kron(np.eye(2), move.b[:, None]) @ force
    kick = np.kron(np.diag([1 / num if noise else 0.0, 1 / (size * num)]), move.q)
    mean, cov = np.zeros(2 * m), np.zeros((2 * m, 2 * m))
    mean[[0, m]] = -mean_y  # of (θ, x̄) − ȳ: it starts at θ = 0 with particles of the prior, at rest
    cov[m, m] = 1 / (size * num)
    result = [abs(mean[0])]
    for _ in range(s.num_steps):
        mean, cov = step @ mean, step @ cov @ step.T + kick
        result.append(np.sqrt(mean[0] ** 2 + cov[0, 0]))
    return np.array(result)


def spread(num_steps: int, move: Move) -> float:
    """Variance of a datum's particles about their mean after K moves from the prior (variance one), exact."""
    step = move.a + np.outer(move.b, np.eye(len(move.b))[0] * -2.0)
    cov = np.diag([1.0, 0.0][: len(move.b)])
    for _ in range(num_steps):
        cov = step @ cov @ step.T + move.q
    return cov[0, 0]


class Case(NamedTuple):
    """A system, the move that theory knows it by, and whether its θ has noise."""

    system: EBIPLA
    move: Move
    noise: bool


def cases(s: Settings) -> dict[str, Case]:
    made = {}
    for name, steps in (("PGD", s.pgd_steps), ("IPLA", s.ipla_steps), ("KIPLMC", s.kiplmc_steps)):
        for c in steps:
            h = c / (2 + s.num_data)
            make = partial(getattr(recipes, name.lower()), step_size=h, num_particles=s.num_particles)
            kinetic = name == "KIPLMC"
            move = underdamped(h, s.friction) if kinetic else overdamped(h)
            options = {"friction": s.friction} if kinetic else {}
            made[f"{name}, h = {c:g}/(2+D)"] = Case(make(model, **options), move, name != "PGD")
            if name == "PGD" and c == 2.0:
                made["PGD, h = 2/(2+D), x one vector"] = Case(make(joint_model), move, False)
    return made


def run(full: bool, seed: int, data_dir: str | None, settings: Settings | None = None) -> Report:
    del data_dir
    s = settings or (FULL if full else REDUCED)
    rng = np.random.RandomState(seed)
    y = s.true_theta + np.sqrt(2) * rng.standard_normal(s.num_data)
    rows, curves, closed, notes = [], {}, {}, []
    where = f"N = {s.num_particles}, K = {s.num_steps}, {s.repeats} repeats"
    for i, (label, (system, move, noise)) in enumerate(cases(s).items()):
        walk = Walk(system, s.num_steps)
        errors, variances = [], []
        for key in random.split(random.fold_in(random.key(seed), i), s.repeats):
            state, path = walk(key, jnp.asarray(y, jnp.float32))
            errors.append(path["theta"] - y.mean())
            posterior = state.posterior.local or state.posterior.shared
            variances.append(np.mean(np.var(np.asarray(posterior["x"]), axis=0, ddof=1)))
        curves[label] = np.sqrt(np.mean(np.square(errors), 0))
        closed[label] = moments(s, y.mean(), move, noise)
        rows.append((f"{label}: RMS of θ − ȳ", float(curves[label][-1]), float(closed[label][-1]), where))
        if "vector" not in label:
            rows.append((f"{label}: posterior variance", float(np.mean(variances)), spread(s.num_steps, move), where))
    notes.append(
        f"PGD's critical step is {critical_step(s.num_data) * (2 + s.num_data):.4f}/(2+D); the paper gives 2/(2+D), "
        "below which it converges and above which it diverges."
    )
    notes.append(
        "Closed forms are exact for K steps of the linear recursion, from its start (θ = 0, particles of the prior); "
        "an RMS over R repeats has a relative standard error of 1/√(2R). The exact posterior variance is 0.5."
    )
    notes.append(
        "IPLA's and KIPLMC's θ is random with variance 2/(DN) as h → 0, so it is not nearer to ȳ than its noise: near "
        "the edge of stability, compare PGD with PGD only."
    )
    data = {"settings": s._asdict(), "critical_step": critical_step(s.num_data), "rms": curves, "closed_form": closed}
    return Report(
        f"Toy hierarchical model, D = {s.num_data} (2204.12965, Example 1)",
        rows,
        data,
        _figure(s, curves, closed),
        tuple(notes),
    )


def _figure(s: Settings, curves: dict[str, np.ndarray], closed: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    steps = np.arange(s.num_steps + 1)
    for i, (label, curve) in enumerate((k, v) for k, v in curves.items() if "vector" not in k):
        (line,) = axis.plot(steps, curve, color=f"C{i}", lw=1.8, label=label)
        if label in closed:
            axis.plot(steps, closed[label], color=line.get_color(), lw=4, alpha=0.3)
    axis.plot([], [], color="grey", lw=4, alpha=0.3, label="closed form of the same colour")
    axis.set(yscale="log", xlabel="step", ylabel="|θ − ȳ|, root mean square over repeats")
    axis.set_title(
        f"Error of the estimate by step: x_d ~ N(θ, 1), y_d ~ N(x_d, 1), D = {s.num_data}, N = {s.num_particles}\n"
        f"PGD converges up to h = {critical_step(s.num_data) * (2 + s.num_data):.3f}/(2+D) and diverges above",
        fontsize=11,
    )
    axis.legend(loc="upper left", fontsize=9, ncols=2)
    axis.grid(alpha=0.3)
    return figure
