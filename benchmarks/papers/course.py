"""A fit followed in equal parts: its quality against the seconds it has taken, compilation and looks left out."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import lax, random
from numpyro.infer import SVI, Trace_ELBO

from numpyro_ebipla import EBIPLA

#: Training points that are reconstructed at the end.
RECONSTRUCTED = 200


class Course(NamedTuple):
    """A fit's course.

    Attributes:
        seconds: at each look.
        quality: likewise, the lower the better.
        per_step: seconds.
        params: the last.
        error: mean squared error of the posterior means of :data:`RECONSTRUCTED` training points.
        ended: why it ended early, if it did.
    """

    seconds: list[float]
    quality: list[float]
    per_step: float
    params: dict[str, Any]
    error: float
    ended: str | None


class Plan(NamedTuple):
    """What all systems of a comparison share.

    Attributes:
        y: training data.
        batch_size: of the minibatches.
        looks: at quality; the steps are split in so many parts.
        judge: quality of parameters.
        decode: ``(params, latents) -> means of the data``.
    """

    y: Any
    batch_size: int
    looks: int
    judge: Callable[[dict[str, Any]], float]
    decode: Callable[[dict[str, Any], Any], Any]


def follow(ebipla: EBIPLA, rng_key: Any, steps: int, plan: Plan) -> Course:
    """A fit by ``ebipla``; one that diverges stands still, and ends."""
    key_fit, key_draws = random.split(rng_key)
    args, kwargs = (plan.y,), {"batch_size": plan.batch_size}
    state = ebipla.init(key_fit, *args, **kwargs)
    ebipla.update(state, *args, **kwargs)  # the model is seen once outside jit
    done = lambda state: int(state.step)
    state, seconds, quality = _in_parts(
        lambda s: ebipla.update(s, *args, **kwargs)[0], state, steps, plan, ebipla.get_params, done
    )
    ended = f"diverged at step {done(state) + 1}" if len(quality) < plan.looks else None
    print(f"{ended or 'done'}: {quality[-1:]} after {seconds[-1]:.0f} s", flush=True)
    few = np.arange(RECONSTRUCTED)
    fit = ebipla.run(key_draws, *args, **kwargs, num_steps=0, init_state=state, indices=few, progress_bar=False)
    means = plan.decode(fit.params, jnp.asarray(fit.get_samples()["x"][:, ::20])).mean((0, 1))
    error = float(((means - plan.y[few]) ** 2).mean())
    return Course(seconds[: len(quality)], quality, seconds[-1] / max(done(state), 1), fit.params, error, ended)


def follow_svi(model: Callable, guide: Callable, rng_key: Any, steps: int, plan: Plan) -> Course:
    """A fit by SVI; its posterior means are its encoder's."""
    svi = SVI(model, guide, numpyro.optim.Adam(3e-3), Trace_ELBO())
    args = plan.y, plan.batch_size
    state, seconds, quality = _in_parts(
        lambda s: svi.update(s, *args)[0], svi.init(rng_key, *args), steps, plan, svi.get_params
    )
    params, few = svi.get_params(state), plan.y[:RECONSTRUCTED]
    mean = traced(guide, params, few, len(few))["fn"].mean
    error = float(((plan.decode(params, mean) - few) ** 2).mean())
    return Course(seconds, quality, seconds[-1] / (steps // plan.looks * plan.looks), params, error, None)


def _in_parts(
    update: Callable, state: Any, steps: int, plan: Plan, get_params: Callable, done: Callable | None = None
) -> tuple[Any, list[float], list[float]]:
    """The last state, seconds and qualities; ``done`` counts the steps taken, and fewer than asked end the run."""
    part = steps // plan.looks
    many = jax.jit(lambda state: lax.scan(lambda s, _: (update(s), None), state, length=part)[0])
    compiled = many.lower(state).compile()
    spent, seconds, quality = 0.0, [], []
    for look in range(plan.looks):
        start = time.perf_counter()
        state = jax.block_until_ready(compiled(state))
        spent += time.perf_counter() - start
        seconds.append(spent)
        if done is not None and done(state) < (look + 1) * part:
            break
        quality.append(plan.judge(get_params(state)))
    return state, seconds, quality


def traced(model: Callable, params: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """The latent site of a model or a guide at these parameters."""
    with numpyro.handlers.seed(rng_seed=0), numpyro.handlers.substitute(data=params), numpyro.handlers.trace() as trace:
        model(*args, **kwargs)
    return trace["x"]


def settled_below(course: Course, level: float) -> float | None:
    """Seconds from which on the quality stays at ``level`` or below."""
    above = [i for i, quality in enumerate(course.quality) if quality > level]
    first = above[-1] + 1 if above else 0
    return course.seconds[first] if first < len(course.seconds) and not course.ended else None


def mse(course: Course) -> str:
    """The reconstruction error, which is no number where the posterior chains diverge."""
    return f"{course.error:.4f}" if np.isfinite(course.error) else "diverges"


def timing(course: Course, steps: int) -> str:
    """Steps, their price and how they ended."""
    return f"{steps} steps, {1e3 * course.per_step:.1f} ms each" + (f"; {course.ended}" if course.ended else "")
