"""Latent energies in two dimensions: the true density is known, and the fitted one on a fine grid.

Data are ``y = A x + 0.1 noise`` in R^10 with orthonormal A. Each family says how to draw x, and of which narrow
Gaussians its density is the mean; so the density of y is a sum.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import linen as nn
from numpyro.contrib.module import flax_module
from scipy import special

from benchmarks.suite.case import Case, Params, Rival, double
from benchmarks.suite.gaussian import LinearGaussian
from examples.rotated_swiss_roll import MLP, mmd2
from numpyro_ebipla import EnergyPrior

NOISE, DIM = 0.1, 10
NUM_DATA, NUM_HELD_OUT, BATCH = 4000, 1000, 500


def energy_model(y, batch_size=None):
    energy = flax_module("energy", MLP(), input_shape=(2,))
    decoder = flax_module("decoder", nn.Dense(y.shape[1]), input_shape=(2,))
    noise = numpyro.param("noise", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        x = numpyro.sample("x", EnergyPrior(energy, dist.Normal(0, 1).expand([2]).to_event(1)))
        numpyro.sample("y", dist.Normal(decoder(x), noise).to_event(1), obs=numpyro.subsample(y, event_dim=1))


def gaussian_model(y, batch_size=None):
    """The same without the energy, for SVI."""
    decoder = flax_module("decoder", nn.Dense(y.shape[1]), input_shape=(2,))
    noise = numpyro.param("noise", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        x = numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(decoder(x), noise).to_event(1), obs=numpyro.subsample(y, event_dim=1))


def encoder_guide(y, batch_size=None):
    encoder = flax_module("encoder", MLP(4), input_shape=(y.shape[1],))
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        out = encoder(numpyro.subsample(y, event_dim=1))
        numpyro.sample("x", dist.Normal(out[..., :2], jnp.exp(out[..., 2:])).to_event(1))


# --- the families -------------------------------------------------------------------------------------


class Family(NamedTuple):
    """A density in the plane: the mean of Gaussians of sd ``blur`` around the nodes, and draws from it.

    Nodes lie closer together than the noise is wide, or are all there are.
    """

    nodes: np.ndarray
    log_weight: np.ndarray
    blur: float
    centres: Callable[[np.random.Generator, int], np.ndarray]  # draws, before the blur

    def draw(self, rng: np.random.Generator, num: int) -> np.ndarray:
        return self.centres(rng, num) + self.blur * rng.normal(size=(num, 2))

    def log_density(self, x: np.ndarray, noise: float = NOISE) -> np.ndarray:
        """Of draws with noise of that sd added to them."""
        variance = self.blur**2 + noise**2
        parts = [
            special.logsumexp(self.log_weight - 0.5 * _square(row, self.nodes) / variance, axis=1) for row in _rows(x)
        ]
        return np.concatenate(parts) - np.log(2 * np.pi * variance)

    def log_density_of_data(self, y: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        """Of draws that ``rotation`` ``[DIM, 2]`` takes out of the plane, with noise added there."""
        along = y @ rotation
        across = (y**2).sum(1) - (along**2).sum(1)
        rest = 0.5 * (DIM - 2) * np.log(2 * np.pi * NOISE**2)
        return self.log_density(along) - 0.5 * across / NOISE**2 - rest


def _square(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T


def _rows(x: np.ndarray, size: int = 50) -> list[np.ndarray]:
    return np.array_split(x, -(-len(x) // size))


def _evenly(nodes: np.ndarray, blur: float, centres: Callable) -> Family:
    return Family(nodes, np.full(len(nodes), -np.log(len(nodes))), blur, centres)


def _along(curve: Callable[[np.ndarray], np.ndarray], blur: float, num: int = 4000) -> Family:
    """Uniform along ``curve(u)``, u in (0, 1)."""
    return _evenly(curve((np.arange(num) + 0.5) / num), blur, lambda rng, n: curve(rng.random(n)))


def swiss_roll() -> Family:
    def curve(u: np.ndarray) -> np.ndarray:
        t = 1.5 * np.pi + 3 * np.pi * u
        return np.stack([t * np.cos(t), t * np.sin(t)], -1) / 7

    return _along(curve, 0.05)


def eight_gaussians() -> Family:
    angle = np.arange(8) * np.pi / 4
    nodes = 2 * np.stack([np.cos(angle), np.sin(angle)], -1)
    return _evenly(nodes, 0.25, lambda rng, n: nodes[rng.integers(8, size=n)])


def two_moons() -> Family:
    def curve(u: np.ndarray) -> np.ndarray:
        upper, t = u < 0.5, 2 * np.pi * (u % 0.5)
        x = np.where(upper, np.cos(t), 1 - np.cos(t)) - 0.5
        return 1.3 * np.stack([x, np.where(upper, np.sin(t), 0.5 - np.sin(t)) - 0.25], -1)

    return _along(curve, 0.13)


def pinwheel() -> Family:
    """Five arms: a long thin Gaussian, bent by a rotation that grows with the radius, and turned."""

    def bend(arm: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        radius = 1 + 0.3 * u
        angle = 2 * np.pi * arm / 5 + 0.25 * np.exp(radius)
        cos, sin = np.cos(angle), np.sin(angle)
        return 1.3 * np.stack([cos * radius - sin * 0.1 * v, sin * radius + cos * 0.1 * v], -1)

    arm, u, v = (m.ravel() for m in np.meshgrid(np.arange(5), np.linspace(-6, 6, 121), np.linspace(-6, 6, 25)))
    log_weight = -0.5 * (u**2 + v**2)
    centres = lambda rng, n: bend(rng.integers(5, size=n), rng.normal(size=n), rng.normal(size=n))
    return Family(bend(arm, u, v), log_weight - special.logsumexp(log_weight), 0.0, centres)


def checkerboard() -> Family:
    corners = np.array([(i, j) for i in range(-2, 2) for j in range(-2, 2) if (i + j) % 2 == 0], float)
    inside = (np.arange(80) + 0.5) / 80
    unit = np.stack(np.meshgrid(inside, inside), -1).reshape(-1, 2)
    nodes = (corners[:, None] + unit).reshape(-1, 2)
    return _evenly(nodes, 0.0, lambda rng, n: corners[rng.integers(8, size=n)] + rng.random((n, 2)))


# --- the truth about a fit ----------------------------------------------------------------------------


_apply = jax.jit(MLP().apply)


class Grid:
    """The fitted prior on a fine grid of the plane, in float64 but for the energy itself."""

    def __init__(self, params: Params, half_width: float = 5.0, num: int = 301):
        axis = np.linspace(-half_width, half_width, num)
        self.points = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
        energy = _apply({"params": params["energy$params"]}, jnp.asarray(self.points, jnp.float32))
        log_prior = -np.asarray(energy, np.float64) - 0.5 * (self.points**2).sum(-1)
        self.log_weight = log_prior - special.logsumexp(log_prior)
        edge = np.exp(self.log_weight[np.abs(self.points).max(1) > half_width - 0.1]).sum()
        assert edge < 1e-5, f"the fitted prior has a mass of {edge:.1e} at the grid's edge"
        exact = double(params)
        self.kernel, self.bias = exact["decoder$params"]["kernel"], exact["decoder$params"]["bias"]
        self.noise = float(params["noise"])

    def log_joint(self, y: np.ndarray) -> np.ndarray:
        """``log p(x, y)`` with the cell's area: ``[rows of y, points]``.

        The squared distance splits into that within the decoder's plane, where the grid is, and that to the plane.
        """
        q, r = np.linalg.qr(self.kernel.T)
        along = (y - self.bias) @ q
        across = ((y - self.bias) ** 2).sum(-1) - (along**2).sum(-1)
        inside = _square(along, self.points @ r.T)
        constant = 0.5 * y.shape[1] * np.log(2 * np.pi * self.noise**2)
        return self.log_weight - 0.5 * (inside + across[:, None]) / self.noise**2 - constant

    def log_likelihood(self, y: np.ndarray) -> np.ndarray:
        return np.concatenate([special.logsumexp(self.log_joint(rows), axis=1) for rows in _rows(y)])

    def posterior(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        means, sds = [], []
        for rows in _rows(y):
            weight = special.softmax(self.log_joint(rows), axis=1)
            mean = weight @ self.points
            means.append(mean)
            sds.append(np.sqrt(weight @ self.points**2 - mean**2))
        return np.concatenate(means), np.concatenate(sds)

    def draw(self, rng: np.random.Generator, num: int) -> np.ndarray:
        """Decoded exact draws."""
        chosen = rng.choice(len(self.points), num, p=np.exp(self.log_weight))
        return self.points[chosen] @ self.kernel + self.bias


def energy_case(name: str, family: Callable[[], Family], seed: int) -> Case:
    rng, family = np.random.default_rng(seed), family()
    rotation = np.linalg.qr(rng.normal(size=(DIM, 2)))[0]
    observe = lambda num: family.draw(rng, num) @ rotation.T + NOISE * rng.normal(size=(num, DIM))
    y, held_out = observe(NUM_DATA).astype(np.float32), observe(NUM_HELD_OUT)
    clean = family.draw(rng, 2000) @ rotation.T
    exact = y.astype(np.float64)

    def gaussian_value(params: Params) -> float:
        p = double(params)
        noise = np.full(DIM, p["noise"] ** 2)
        decoder = p["decoder$params"]
        return LinearGaussian(np.zeros(2), np.eye(2), decoder["kernel"].T, decoder["bias"], noise).log_density(held_out)

    return Case(
        name,
        energy_model,
        (y,),
        "x",
        NUM_DATA,
        value=lambda params: float(Grid(params).log_likelihood(held_out).mean()),
        optimum=float(family.log_density_of_data(held_out, rotation).mean()),
        posterior=lambda params, indices: Grid(params).posterior(exact[indices]),
        kwargs={"batch_size": BATCH},
        threshold=0.05,
        rival=Rival(gaussian_model, encoder_guide, gaussian_value),
        extra=lambda params: {
            "mmd2": mmd2(*map(jnp.asarray, (Grid(params).draw(np.random.default_rng(0), 2000), clean)))
        },
    )
