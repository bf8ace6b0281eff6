"""The checkpoints of a run: where they lie, which one it goes on from, and whether that is of the same run."""

import contextlib
import os
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array, random

from numpyro_ebipla._core.errors import CheckpointError, ModelError, warn
from numpyro_ebipla._core.validate import as_count
from numpyro_ebipla.checkpoint.files import (
    Checkpoint,
    clean,
    file_name,
    fingerprint,
    latest,
    list_checkpoints,
    load,
    restore,
    save,
)

#: What the header of a run's checkpoint says.
HEADER = ("step", "started_at", "start", "data", "model", "program", "releases")

#: Steps between two checkpoints, and how many are kept, unless said otherwise.
EVERY, KEEP = 1000, 3


class Store:
    """The checkpoints of one run, in a directory of their own.

    Args:
        directory: made if there is none.
        every: steps between two checkpoints.
        keep: how many to keep.
        resume: True continues from the latest, ``"previous"`` from the latest that is sound; False wants a
            directory without any.

    Raises:
        TypeError, ValueError: naming the argument of ``run`` that is off.
        CheckpointError: if ``resume`` is False and there are checkpoints.
    """

    def __init__(
        self, directory: str | os.PathLike, every: int = EVERY, keep: int = KEEP, resume: bool | str = True
    ) -> None:
        if not isinstance(directory, str | os.PathLike) or not str(directory):
            raise TypeError(f"checkpoint_dir must be the path of a directory, got {directory!r}.")
        self.every = as_count("checkpoint_every", every)
        self.keep = as_count("keep_checkpoints", keep)
        if not isinstance(resume, bool) and resume != "previous":
            raise ValueError(f"resume must be True, False or 'previous', got {resume!r}.")
        self.resume, self.directory = resume, Path(directory)
        self.identity: dict[str, Any] = {}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # the latter for a null byte
            raise ValueError(
                f"checkpoint_dir: {str(directory)!r} is not a directory and cannot be made ({error})."
            ) from error
        if not os.access(self.directory, os.R_OK | os.W_OK | os.X_OK):
            raise ValueError(f"checkpoint_dir: no permission to read and write in '{directory}'.")
        if resume is False and latest(self.directory):
            raise CheckpointError(
                f"checkpoint_dir: '{directory}' already holds checkpoints, and resume=False: use an empty directory, "
                "or resume=True to go on from the latest."
            )

    def read(self, rng_key: Array, num_steps: int) -> Checkpoint | None:
        """Return the checkpoint to go on from, or None; remove what a kill left unfinished.

        Args:
            rng_key: of the run.
            num_steps: of the run, in total.

        Raises:
            CheckpointError: if the latest file is damaged and ``resume`` is not ``"previous"``, or all are.
            ModelError: if it is of another key, or beyond ``num_steps``.
        """
        clean(self.directory)
        key = {"impl": str(random.key_impl(rng_key)), "data": np.asarray(random.key_data(rng_key)).tolist()}
        self.identity["rng_key"] = key
        found = self._newest_sound()
        if found is None:
            return None
        if found.header.get("rng_key") != self.identity["rng_key"]:
            raise ModelError(
                f"checkpoint_dir: '{found.path}' is of a run with another rng_key: pass that run's key, or use a "
                "directory for each run."
            )
        done = found.header["step"] - found.header["started_at"]
        if done > num_steps:
            raise ModelError(
                f"checkpoint_dir: '{found.path}' is {done} steps into its run, beyond num_steps={num_steps} (which "
                "counts from the start of the run): raise num_steps, or use another directory."
            )
        return found

    def resume_from(
        self, found: Checkpoint | None, state: Any, data: Any, programs: dict[str, str], given: Any = None
    ) -> tuple[Any, Checkpoint | None]:
        """Return the state to go on from, that of ``found`` or ``state``; and ``found``, rid of its copy of it.

        Args:
            found: from :meth:`read`.
            state: the state at the start of the run, with a ``step``.
            data: the model's array arguments.
            programs: ``"model"`` and ``"program"``, texts of the model's log density and of the steps.
            given: the run's ``init_state``, or ``init_params`` and particles to begin at, if any.

        Raises:
            ModelError: if the checkpoint is of another model, shapes or start.
        """
        self.identity |= {
            "started_at": int(state.step),
            "start": fingerprint(jax.tree.leaves(given)),
            "data": fingerprint(jax.tree.leaves(data)),
            **{name: f"{zlib.crc32(text.encode()):08x}" for name, text in programs.items()},
            "releases": releases(),
        }
        if found is None:
            return state, None
        restored = restore(found, state)
        header, ours = found.header, self.identity
        if header["started_at"] != ours["started_at"]:
            raise ModelError(
                f"checkpoint_dir: the run of '{found.path}' began at step {header['started_at']}, but this one "
                f"begins at step {ours['started_at']}: pass that run's init_state, or use another directory."
            )
        if header["start"] != ours["start"]:
            raise ModelError(
                f"checkpoint_dir: the run of '{found.path}' began with another init_state or init_params, or with "
                "particles elsewhere: pass that run's, or use another directory."
            )
        changed = {name for name in ("data", "model", "program") if header[name] != ours[name]}
        updated = header["releases"] != ours["releases"]  # which changes the texts as well
        if "model" in changed and not updated:
            raise ModelError(
                f"checkpoint_dir: '{found.path}' is of another model, as its log density is another function, of the "
                "same parameters and latents: pass that run's model (and batch_size), or use another directory."
            )
        if "data" in changed:
            self._warn(found, "the data differ from those of")
        elif changed and updated:
            self._warn(
                found,
                f"releases differ ({differing(header['releases'])}), so it cannot be told whether the "
                "model and settings are those of",
            )
        elif changed:
            self._warn(found, "the settings of EBIPLA(...) differ from those of")
        return restored, found._replace(state={})

    def save(
        self,
        state: Any,
        history: dict[str, np.ndarray],
        probes: dict[str, np.ndarray],
        looks: dict[str, np.ndarray] | None = None,
    ) -> bool:
        """Write a checkpoint and remove the oldest; a write that fails costs a warning, not the run."""
        step = int(state.step)
        try:
            meta = {"step": step, **self.identity}
            save(self.directory / file_name(step), state, history, meta, probes, looks=looks or None)
            for old in list_checkpoints(self.directory)[: -self.keep]:
                old.unlink(missing_ok=True)
        except OSError as error:
            warn(f"checkpoint_dir: no checkpoint at step {step} ({error}); the fit goes on.")
            return False
        return True

    def _newest_sound(self) -> Checkpoint | None:
        bad = []
        for path in reversed(list_checkpoints(self.directory)):
            try:
                found = load(path)
                lacking = [name for name in HEADER if name not in found.header]
                if lacking:
                    raise CheckpointError(f"'{path}' is not the checkpoint of a run: it lacks {lacking}.")
            except CheckpointError as error:
                if self.resume != "previous":
                    raise CheckpointError(
                        f"checkpoint_dir: {error} resume='previous' goes on from the one before it."
                    ) from error
                bad.append((path, error))
                continue
            for file, why in bad:
                aside = file.with_name(f"{file.name}.bad")  # else it would be the latest the next time, too
                os.replace(file, aside)
                warn(
                    f"checkpoint_dir: {why} Going on from step {found.header['step']}; the file is now '{aside.name}'."
                )
            return found
        if bad:
            raise CheckpointError(f"checkpoint_dir: no checkpoint is sound; {bad[0][1]} Start in an empty directory.")
        return None

    @staticmethod
    def _warn(found: Checkpoint, what: str) -> None:
        message = f"checkpoint_dir: {what} '{found.path}'. The fit goes on from it all the same; use another directory "
        warn(f"{message}to start afresh.")


def open_store(
    directory: str | os.PathLike | None, every: int = EVERY, keep: int = KEEP, resume: bool | str = True
) -> Store | None:
    """Return the :class:`Store` that the arguments of ``run`` ask for, or None.

    Raises:
        ValueError: as of a store, and if there is no directory although other arguments want one.
    """
    if directory is not None:
        return Store(directory, every, keep, resume)
    if (every, keep, resume) != (EVERY, KEEP, True):
        raise ValueError(
            "checkpoint_every, keep_checkpoints and resume need checkpoint_dir=…, a directory of this run."
        )
    return None


def releases() -> dict[str, str]:
    """Return the versions of the packages on which a compiled program's text depends."""
    found = {}
    for name in ("jax", "numpyro", "flax", "equinox", "numpyro_ebipla"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def differing(theirs: dict[str, str]) -> str:
    """Say which releases differ from the ones here."""
    ours = releases()
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    return ", ".join(f"{name} {theirs.get(name)} there, {ours.get(name)} here" for name in names)
