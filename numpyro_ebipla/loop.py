"""The host's loop over jitted chunks of steps: progress, divergence, Ctrl-C."""

import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from tqdm.auto import tqdm

from numpyro_ebipla._errors import EBIPLAWarning
from numpyro_ebipla._types import TrainState
from numpyro_ebipla.step import Config, step

#: Steps between two looks of the host at a run; the first looks come early.
CHUNK = 100


def run_steps(
    chunk: Callable, state: TrainState, data: Any, num_steps: int, progress_bar: bool
) -> tuple[TrainState, dict[str, np.ndarray], str | None]:
    """Chunks of jitted steps, with a look between them.

    Args:
        chunk: :func:`run_chunk`, jitted for a configuration; it may donate the state.
        state: to start from.
        data: the model's array arguments.
        num_steps: to take.
        progress_bar: whether to show one.

    Returns:
        The last sound state, ``{name: [steps]}`` and why the run ended early (or None).
    """
    parts: list[dict[str, np.ndarray]] = []
    done, stopped = 0, None
    with tqdm(total=num_steps, disable=not progress_bar, desc="fit") as bar, _held_interrupt() as interrupt:
        try:
            while done < num_steps and stopped is None:
                if interrupt.is_set():
                    raise KeyboardInterrupt
                size = min(1 if done == 0 else 9 if done == 1 else CHUNK, num_steps - done)
                state, taken, info = chunk(state, data, jnp.asarray(size, jnp.int32))
                taken = int(taken)
                parts.append({k: np.asarray(v)[:taken] for k, v in info.items()})
                sound = parts[-1].pop("sound")
                done += taken
                bar.update(taken)
                bar.set_postfix(_postfix(parts[-1]), refresh=False)
                if not sound.all():
                    stopped = _reason(parts[-1], int(state.step))
                    warnings.warn(stopped, EBIPLAWarning, stacklevel=3)
        except KeyboardInterrupt:
            stopped = f"interrupted after step {int(state.step)}"
            warnings.warn(f"{stopped}; the fit holds what was reached.", EBIPLAWarning, stacklevel=3)
    keys = parts[0] if parts else {"contrast": np.zeros(0)}
    history = {k: np.concatenate([p[k] for p in parts]) if parts else np.zeros(0) for k in keys}
    return state, history, stopped


@contextmanager
def _held_interrupt() -> Iterator[threading.Event]:
    """Inside, the first Ctrl-C only sets the event: a chunk that has begun owns the state's buffers.

    A second one interrupts at once. Signals reach the main thread only; elsewhere nothing changes.
    """
    pressed = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield pressed
        return

    def handler(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        pressed.set()

    signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def run_chunk(
    config: Config, state: TrainState, data: Any, num_steps: Array
) -> tuple[TrainState, Array, dict[str, Array]]:
    """Up to ``num_steps`` steps (traced, so that every length shares one compilation)."""
    shapes = jax.eval_shape(lambda s, d: step(config, s, d)[1], state, data)
    record = jax.tree.map(lambda x: jnp.zeros((CHUNK, *x.shape), x.dtype), shapes)

    def go_on(carry: Any) -> Array:
        i, _, _, sound = carry
        return (i < num_steps) & sound

    def body(carry: Any) -> Any:
        i, state, record, _ = carry
        state, info = step(config, state, data)
        record = jax.tree.map(lambda r, x: r.at[i].set(x), record, info)
        return i + 1, state, record, info["sound"]

    taken, state, record, _ = lax.while_loop(go_on, body, (jnp.zeros((), jnp.int32), state, record, jnp.array(True)))
    return state, taken, record


def _postfix(info: dict[str, np.ndarray]) -> dict[str, str]:
    """What the progress bar shows of a chunk."""
    shown = {"contrast": f"{np.mean(info['contrast']):.3g}"}
    for name, value in info.items():
        if name.startswith("accept") or name.rpartition("/")[2] in ("ess", "swap", "log_z"):
            shown[name.replace("accept_", "acc ")] = f"{value[-1]:.2f}"
    return shown


def _reason(info: dict[str, np.ndarray], reached: int) -> str:
    value = info["contrast"][-1]
    what = (
        "the contrast is not finite"
        if not np.isfinite(value)
        else ("parameters, particles or walkers' energies left the finite range or the bound max_energy")
    )
    return (
        f"the fit diverged at step {reached + 1}: {what} (contrast {value:.3g}). It stopped and holds the state after "
        f"step {reached}. Lower the learning rate, or use adjusted chains (kernel=MALA(), prior=Tempered())."
    )
