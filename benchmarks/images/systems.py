"""The systems of the comparison, each trained for given seconds, compilation left out."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import numpyro
import optax
from jax import random
from numpyro.infer import SVI, Trace_ELBO

from benchmarks.images.networks import make_guide, make_model
from numpyro_ebipla import EBIPLA, recipes

DEFAULT, GUIDED, EBIPLA_PAPER, LEBM, GAUSSIAN, VAE = (
    "default",
    "default after a VAE",
    "EBIPLA, as in the paper",
    "LEBM",
    "Gaussian prior",
    "VAE (SVI)",
)
NAMES = (DEFAULT, GUIDED, EBIPLA_PAPER, LEBM, GAUSSIAN, VAE)
#: Share of the seconds that goes to the VAE from which another system starts.
HEAD = 0.3
VAE_RATE = 1e-3
#: Of LEBM's energy and generator: five and ten times the paper's, whose steps are a hundred times as many.
LEBM_RATES = {"energy": optax.adam(1e-4, b1=0.5), "rest": optax.adam(1e-3, b1=0.5)}
#: Steps of SVI between two looks at the clock, and of the others in the run that compiles all that a run takes.
SVI_CHUNK, FIRST_STEPS = 20, 100
MANY = 10**9
#: Seconds to the next look, where the last one came late.
LEAST = 0.01


class Task(NamedTuple):
    """What all systems share: bytes to learn from, sizes, and when to look, in seconds."""

    images: np.ndarray
    num_latents: int
    width: int
    batch_size: int
    looks: tuple[float, ...]
    seed: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image."""
        return self.images.shape[1:]

    def model(self, energy_based: bool = True) -> Callable:
        """The model, with an energy prior or a Gaussian one."""
        return make_model(self.shape, self.num_latents, self.width, energy_based)

    def draw_normal(self, rng_key: Any, n: int) -> Any:
        """Draw latents from the Gaussian prior."""
        return random.normal(rng_key, (n, self.num_latents))

    @property
    def guide(self) -> Callable:
        """The encoder."""
        return make_guide(self.shape, self.num_latents, self.width)


class Look(NamedTuple):
    """A system after some seconds.

    Attributes:
        seconds: of training.
        steps: taken.
        particles: of each datum; 0 for SVI.
        params: of the model.
        draw: ``(rng_key, n) -> [n, d]`` latents from the prior.
        history: of the last part; empty for SVI.
    """

    seconds: float
    steps: int
    particles: int
    params: dict[str, Any]
    draw: Callable
    history: dict[str, np.ndarray]


def train(name: str, task: Task) -> Iterator[Look]:
    """Train a system, and stop at each look."""
    if name == VAE:
        yield from _train_vae(task, task.looks)
    elif name == GUIDED:
        head = HEAD * task.looks[-1]
        before = [*(s for s in task.looks if s < head), head]
        for look in _train_vae(task, before):
            if look.seconds < head:
                yield look
        generator = {"generator$params": look.params["generator$params"]}
        ebipla = EBIPLA(task.model(), guide=task.guide, guide_params=look.params)
        after = [s - look.seconds for s in task.looks if s > head]
        for now in _train_ebipla(ebipla, task, after, init_params=generator):
            yield now._replace(seconds=now.seconds + look.seconds, steps=now.steps + look.steps)
    else:
        ebipla = {
            DEFAULT: lambda: EBIPLA(task.model()),
            EBIPLA_PAPER: lambda: recipes.ebipla(task.model(), num_particles=1),
            LEBM: lambda: recipes.lebm(task.model(), optim=LEBM_RATES),
            GAUSSIAN: lambda: EBIPLA(task.model(energy_based=False)),
        }[name]()
        yield from _train_ebipla(ebipla, task, task.looks)


def _train_ebipla(ebipla: EBIPLA, task: Task, looks: Any, **start: Any) -> Iterator[Look]:
    options = {"batch_size": task.batch_size, "num_samples": 0, "progress_bar": False}
    key = random.key(task.seed)
    run = lambda num_steps, **more: ebipla.run(key, task.images, num_steps=num_steps, **options, **more)
    run(FIRST_STEPS, **start)
    spent, steps, more = 0.0, 0, start
    for until in looks:
        begun = time.monotonic()
        fit = run(MANY, max_time=max(until - spent, LEAST), **more)
        spent, steps, more = spent + time.monotonic() - begun, steps + len(fit.losses), {"init_state": fit.state}
        yield Look(spent, steps, fit.num_chains, fit.params, _prior(fit, task), fit.history)


def _prior(fit: Any, task: Task) -> Callable:
    if not fit.config.model.energies:
        return task.draw_normal
    prior = fit.energy_prior("x")
    return lambda rng_key, n: prior.sample(rng_key, (n,))


def _train_vae(task: Task, looks: Any) -> Iterator[Look]:
    """Step by step: convolutions are slow inside the loops of ``svi.run`` on a CPU."""
    svi = SVI(task.model(energy_based=False), task.guide, numpyro.optim.Adam(VAE_RATE), Trace_ELBO())
    args, kwargs = (task.images,), {"batch_size": task.batch_size}
    state = svi.init(random.key(task.seed), *args, **kwargs)
    images = jax.device_put(task.images)
    update = jax.jit(lambda state, images: svi.update(state, images, **kwargs))
    update(state, images)  # compile
    spent, steps = 0.0, 0
    for until in looks:
        begun, now = time.monotonic(), 0.0
        while not now or now < until - spent:
            for _ in range(SVI_CHUNK):
                state, loss = update(state, images)
            loss.block_until_ready()
            steps, now = steps + SVI_CHUNK, time.monotonic() - begun
        spent += now
        yield Look(spent, steps, 0, svi.get_params(state), task.draw_normal, {})
