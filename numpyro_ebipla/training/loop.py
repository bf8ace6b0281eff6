"""The host's loop over jitted chunks of steps: progress, checkpoints, early ends, divergence, Ctrl-C."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from tqdm.auto import tqdm

from numpyro_ebipla._core.errors import warn
from numpyro_ebipla._core.state import Params, TrainState
from numpyro_ebipla.checkpoint.files import Checkpoint
from numpyro_ebipla.checkpoint.store import Store
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.particles.block import gather
from numpyro_ebipla.training.config import Config
from numpyro_ebipla.training.newton import LOOK_EVERY, Looks, Watch, is_due
from numpyro_ebipla.training.second_start import SECOND_START, SecondStart
from numpyro_ebipla.training.step import batch_indices, log_joint_at
from numpyro_ebipla.training.stopping import (
    NO_LIMITS,
    PROBE_EVERY,
    Limits,
    is_judged,
    probe,
    run_r_hat,
    thresholds,
)

#: Steps between two looks of the host at a run; the first looks come early.
CHUNK = 100


def run_steps(
    chunk: Callable,
    state: TrainState,
    data: Any,
    num_steps: int,
    progress_bar: bool,
    limits: Limits = NO_LIMITS,
    store: Store | None = None,
    found: Checkpoint | None = None,
    watch: Watch | None = None,
    second: SecondStart | None = None,
) -> tuple[TrainState, dict[str, np.ndarray], str | None]:
    """Run chunks of jitted steps, with a look between them.

    Where the chunks end changes no number: a step depends on the state and the data only.

    Args:
        chunk: :func:`run_chunk`, jitted for a configuration; it may donate the state.
        state: to start from.
        data: the model's array arguments.
        num_steps: to take, those of ``found`` included.
        progress_bar: whether to show one.
        limits: when to end before.
        store: where to save checkpoints, if anywhere.
        found: the checkpoint that the state is of: its history is continued.
        watch: what ends a run that has arrived, if that is known.
        second: what gives parameters a second start, likewise.

    Returns:
        The last sound state, ``{name: [steps]}`` and why the run ended early (or None).
    """
    begun = done = saved = len(found.history["contrast"]) if found else 0
    record, first, stopped, pace = Record.of(found, done), int(state.step) - done, None, 0.0
    wanted, looking = _to_settle(limits, chunk, state, data)
    if looking:
        record.add_blanks(done, state.params)
    marks = [CHUNK, *([store.every] if store else []), *([PROBE_EVERY] if looking else [])]
    marks += [LOOK_EVERY] if watch else []
    again_at = SECOND_START - first if second else 0
    with tqdm(total=num_steps, initial=done, disable=not progress_bar, desc="fit") as bar, _held_interrupt() as pressed:
        try:
            while done < num_steps:
                if pressed.is_set():
                    raise KeyboardInterrupt
                now = time.monotonic()
                # The time is looked at after a chunk only, so that every call gets somewhere.
                stopped = record.arrived(watch, state, done)
                stopped = stopped or _limit_reached(wanted, record, done, bool(pace) and now >= limits.deadline)
                if stopped:
                    break
                size = min(_next_edge(done, begun, marks, again_at), num_steps) - done
                if pace:
                    size = int(np.clip((limits.deadline - now) / pace, 1, size))
                state, taken, info = chunk(state, data, jnp.asarray(size, jnp.int32))
                taken = int(taken)
                pace = (time.monotonic() - now) / size
                part = {k: np.asarray(v)[:taken] for k, v in info.items()}
                sound = part.pop("sound")
                record.history.append(part)
                done += taken
                bar.update(taken)
                bar.set_postfix(_postfix(part), refresh=False)
                if not sound.all():
                    stopped = _reason(part, int(state.step))
                    warn(stopped)
                    break
                if looking and done % PROBE_EVERY == 0:
                    record.probes.append(_look(state.params))
                if watch and is_due(record.looks, done):
                    record.looks.append(watch.look(done, state, data))
                if second and done == again_at:
                    state = second.consider(state, data)
                if store and done % store.every == 0 and store.save(state, *record.joined()):
                    saved = done
            bar.total = done  # at its end, wherever that is
        except KeyboardInterrupt:
            if state.step.is_deleted():  # a second Ctrl-C, just when a chunk took the buffers
                raise
            stopped = f"interrupted after step {int(state.step)}"
            warn(f"{stopped}; the fit holds what was reached.")
        # Neither after a divergence, nor where a second Ctrl-C came between a chunk and its record.
        if store and saved < done == int(state.step) - first:
            store.save(state, *record.joined())
    return state, record.joined().history, stopped


class Joined(NamedTuple):
    """What a run has said: ``{name: [steps]}``, ``{site: [looks, r]}``, and the fields of :class:`.Looks`, if any."""

    history: dict[str, np.ndarray]
    probes: dict[str, np.ndarray]
    looks: dict[str, np.ndarray]


class Record(NamedTuple):
    """The same in parts."""

    history: list[dict[str, np.ndarray]]
    probes: list[dict[str, np.ndarray]]
    looks: list[Looks]

    @staticmethod
    def of(found: Checkpoint | None, done: int) -> "Record":
        """Start a record, continuing that of a checkpoint if there is one."""
        if not found:
            return Record([], [], [])
        looks = [Looks(**found.looks)] if found.looks else []
        return Record([found.history] if done else [], [found.probes] if found.probes else [], looks)

    def joined(self) -> Joined:
        """Return all parts as one."""
        history = _join(self.history) or {"contrast": np.zeros(0)}
        return Joined(history, _join(self.probes), self.joined_looks())

    def joined_looks(self) -> dict[str, np.ndarray]:
        """Return these alone: they are asked for again and again, and a history may be long."""
        return _join([part._asdict() for part in self.looks])

    def arrived(self, watch: Watch | None, state: TrainState, done: int) -> str | None:
        """Return why the run is over, if it is known to have arrived."""
        if not watch or not self.looks or self.looks[-1].step[-1] != done:
            return None
        return watch.verdict(Looks(**self.joined_looks()), state, done)

    def add_blanks(self, done: int, params: Params) -> None:
        """Add NaN for the looks that nobody took, as the run did not go by them then."""
        taken = len(next(iter(self.probes[0].values()))) if self.probes else 0
        blank = {k: np.full((done // PROBE_EVERY - taken, v.shape[1]), np.nan) for k, v in _look(params).items()}
        self.probes.append(blank)


def _look(params: Params) -> dict[str, np.ndarray]:
    return {k: np.asarray(v, float)[None] for k, v in probe(params).items()}


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {k: np.concatenate([p[k] for p in parts]) for k in (parts[0] if parts else ())}


def _next_edge(done: int, begun: int, marks: list[int], once: int) -> int:
    """Return where the chunk after ``done`` steps ends: the host looks early, at multiples of the marks, and once."""
    early = begun + (1 if done == begun else 10 if done < begun + 10 else CHUNK + done)
    return min(early, *((done // mark + 1) * mark for mark in marks), *([once] if once > done else []))


def _to_settle(limits: Limits, chunk: Callable, state: TrainState, data: Any) -> tuple[dict[str, float], bool]:
    """Return ``{name: threshold}`` of what has to settle, and whether parameters are among it."""
    names = []
    if isinstance(limits.r_hat, dict):  # only a trace of the steps knows what they will say
        names = [n for n in jax.eval_shape(chunk, state, data, jnp.zeros((), jnp.int32))[2] if n != "sound"]
    wanted = thresholds(limits.r_hat, list(state.params), names)
    return wanted, any(name in state.params for name in wanted)


def _limit_reached(wanted: dict[str, float], record: Record, done: int, late: bool) -> str | None:
    """Return why to stop here, if at all."""
    if wanted and is_judged(done):
        history, probes, _ = record.joined()
        r_hat = run_r_hat(wanted, probes, history)
        if all(r_hat[name] < wanted[name] for name in wanted):
            said = ", ".join(f"{name} {value:.3f}" for name, value in r_hat.items())
            return f"settled after {done} steps, by split R-hat over the last half of them: {said}"
    return f"max_time was over after {done} steps" if late else None


@contextmanager
def _held_interrupt() -> Iterator[threading.Event]:
    """Let the first Ctrl-C, within this context, only set the event: a chunk that has begun owns the state's buffers.

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
    update: Callable, state: TrainState, data: Any, num_steps: Array
) -> tuple[TrainState, Array, dict[str, Array]]:
    """Take up to ``num_steps`` steps (traced, so that every length shares one compilation).

    ``update`` is a jitted :func:`.step`: it is traced once, for the shapes of what it reports and for the loop.
    """
    _, shapes = jax.eval_shape(update, state, data)
    record = jax.tree.map(lambda x: jnp.zeros((CHUNK, *x.shape), x.dtype), shapes)

    def go_on(carry: Any) -> Array:
        i, _, _, sound = carry
        return (i < num_steps) & sound

    def body(carry: Any) -> Any:
        i, state, record, _ = carry
        state, info = update(state, data)
        record = jax.tree.map(lambda r, x: r.at[i].set(x), record, info)
        return i + 1, state, record, info["sound"]

    taken, state, record, _ = lax.while_loop(go_on, body, (jnp.zeros((), jnp.int32), state, record, jnp.array(True)))
    return state, taken, record


def describe_programs(config: Config, chunk: Any, state: TrainState, data: Any) -> dict[str, str]:
    """Return texts that are equal for equal models (``"model"``: of the log density) and for equal settings."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, data))

    def log_density(state: TrainState, data: Any) -> Any:
        batch = Batch(batch_indices(config.model, state), data, state.rng_key, state.mutable)
        block, _ = gather(state.posterior, batch.indices)
        return log_joint_at(config.model, state.params, batch, {})(block.latents)

    # The same on any device, as a run may go on elsewhere.
    model = jax.jit(log_density).trace(*shapes).lower(lowering_platforms=("cpu",))
    return {
        "model": model.as_text(),
        "program": chunk.lower(state, data, jnp.zeros((), jnp.int32)).as_text(),
    }


def _postfix(info: dict[str, np.ndarray]) -> dict[str, str]:
    """Return what the progress bar shows of a chunk."""
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
        f"step {reached}. Start nearer (init_params=…), lower the learning rate, or, if chains are not adjusted, use "
        "kernel=MALA() and prior=Tempered()."
    )
