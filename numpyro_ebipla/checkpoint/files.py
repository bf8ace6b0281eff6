"""One file of a checkpoint: written whole or not at all, read without pickle."""

import contextlib
import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_ebipla._core.errors import CheckpointError, ModelError, x64_hint
from numpyro_ebipla._core.tree import by_path

FORMAT = "numpyro_ebipla checkpoint"
#: Of the format and of the state's leaves: 2 since each strategy has a state of its own, 3 since couplings have blocks,
#: 4 since networks have an optimiser of their own.
VERSION = 4

_NAME = re.compile(r"step_(\d{12})\.npz")
_UNFINISHED = re.compile(r"\.step_\d{12}\.npz\.\d+\.tmp")
_SEAL = b"sha256:"
_SEAL_LENGTH = len(_SEAL) + 64
_DATE = (1980, 1, 1, 0, 0, 0)  # of every member, so that equal states make equal files


class Checkpoint(NamedTuple):
    """What a file holds.

    Attributes:
        header: the JSON header.
        state: ``{path: array}`` leaves of the state, by :func:`jax.tree_util.keystr`; keys as their data.
        history: ``{name: [K]}`` of all steps so far.
        probes: ``{site: [K // 25, r]}`` what :mod:`numpyro_ebipla.training.stopping` goes by; may be empty.
        path: of the file.
        fit: ``{name: array}`` what a saved fit holds beyond these; empty for a checkpoint of a run.
        looks: ``{name: [n, …]}`` at the likelihood, see :mod:`numpyro_ebipla.training.newton`; may be empty.
    """

    header: dict[str, Any]
    state: dict[str, np.ndarray]
    history: dict[str, np.ndarray]
    probes: dict[str, np.ndarray]
    path: Path
    fit: dict[str, np.ndarray] = {}
    looks: dict[str, np.ndarray] = {}


# --- one file -----------------------------------------------------------------------------------------


def save(
    path: str | os.PathLike,
    state: Any,
    history: dict[str, np.ndarray],
    meta: dict[str, Any],
    probes: dict[str, np.ndarray] | None = None,
    fit: dict[str, Any] | None = None,
    looks: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a checkpoint: to a temporary file beside ``path``, flushed to the disk, then renamed.

    Args:
        path: of the file; one that exists is replaced.
        state: any pytree of arrays.
        history: ``{name: array}``.
        meta: more entries for the header, JSON values.
        probes: ``{name: array}``.
        fit: likewise, what a fit holds beyond the state and the history.
        looks: likewise.

    Returns:
        The path.

    Raises:
        OSError: if the disk is full or the like; then nothing has changed.
    """
    path = Path(path)
    groups = {"state": by_path(state), "history": history, "probes": probes or {}}
    groups |= {name: more for name, more in (("fit", fit), ("looks", looks)) if more is not None}
    arrays: dict[str, np.ndarray] = {}
    header = {
        "format": FORMAT,
        "version": VERSION,
        **meta,
    }
    for group, values in groups.items():
        header[group] = {}
        for name, value in values.items():
            arrays[f"{group}/{name}"], header[group][name] = _encode(value)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            _write(file, header, arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)
    return path


def load(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint and check that every byte is as it was written.

    Raises:
        CheckpointError: if the file is cut short, damaged, of another format version, or no checkpoint.
        FileNotFoundError: if there is none.
    """
    path = Path(path)
    with _opened(path) as file:
        try:
            _check_seal(file, path)
            with zipfile.ZipFile(file) as archive:
                header = json.loads(archive.read("header.json"))
                _check_version(header, path)
                there = ("state", "history", "probes", *(name for name in ("fit", "looks") if name in header))
                groups = {
                    group: {name: _decode(archive, f"{group}/{name}", about) for name, about in header[group].items()}
                    for group in there
                }
        except (zipfile.BadZipFile, KeyError, TypeError, ValueError, EOFError, OSError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"'{path}' is not a checkpoint of numpyro_ebipla ({error}).") from error
    return Checkpoint(header, **groups, path=path)


def _opened(path: Path) -> Any:
    if not os.path.lexists(path):
        raise FileNotFoundError(f"there is no file '{path}'.")
    try:
        return open(path, "rb")
    except OSError as error:  # a directory or a dangling link of this name, no permission, a failing disk
        raise CheckpointError(f"'{path}' cannot be read ({error}).") from error


def restore(
    checkpoint: Checkpoint,
    template: Any,
    what: str = "checkpoint_dir",
    remedy: str = "Use another directory, or the model, data and EBIPLA(...) of that run",
) -> Any:
    """Return the saved state, in the structure of ``template``.

    Args:
        checkpoint: from :func:`load`.
        template: a state of the same model with the same arguments and settings.
        what: argument or method that errors name.
        remedy: what they say to do.

    Raises:
        ModelError: naming the first leaf that is missing, or has another shape or dtype.
    """
    wanted = {path: _describe(leaf) for path, leaf in by_path(template).items()}
    saved = checkpoint.header["state"]
    for name in [*wanted, *saved]:
        if wanted.get(name) != saved.get(name):
            there, here = saved.get(name), wanted.get(name)
            hint = x64_hint(there["dtype"], here["dtype"]) if there and here else ""
            raise ModelError(
                f"{what}: '{checkpoint.path}' is of another model, data or settings: at '{name}' it holds "
                f"{_say(there)}, but this fit has {_say(here)}. {remedy}{hint and f'; {hint}'}."
            )
    leaves = [_to_jax(checkpoint.state[name], about) for name, about in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def latest(directory: str | os.PathLike) -> Path | None:
    """Return the checkpoint of the highest step in a directory, or None; unfinished files do not count."""
    found = list_checkpoints(directory)
    return found[-1] if found else None


def list_checkpoints(directory: str | os.PathLike) -> list[Path]:
    """Return the checkpoints of a directory, oldest first; unfinished files do not count."""
    return sorted(path for path in Path(directory).iterdir() if _NAME.fullmatch(path.name))


def clean(directory: str | os.PathLike) -> None:
    """Remove what a kill in the midst of :func:`save` left behind."""
    for path in Path(directory).iterdir():
        if _UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


def fingerprint(arrays: Iterable[Any]) -> str:
    """Return a short checksum of arrays, with their shapes and dtypes.

    >>> fingerprint([np.zeros(2)]) == fingerprint([np.zeros(2)]) != fingerprint([np.ones(2)])
    True
    """
    total = 0
    for array in arrays:
        data, about = _encode(array)
        total = zlib.crc32(np.ascontiguousarray(data).tobytes(), zlib.crc32(json.dumps(about).encode(), total))
    return f"{total:08x}"


# --- parts --------------------------------------------------------------------------------------------


def file_name(step: int) -> str:
    """Return the name of a step's file; it has twelve digits, so that names sort like steps."""
    return f"step_{step:012}.npz"


def _is_key(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _describe(value: Any) -> dict[str, Any]:
    """Return what the header says of an array: shape, dtype and, for a typed key, its implementation."""
    if _is_key(value):
        return {"shape": list(value.shape), "dtype": "key", "impl": str(random.key_impl(value))}
    return {"shape": list(value.shape), "dtype": np.dtype(value.dtype).name}


def _encode(value: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Return an array as NumPy can write it: keys by their data, bfloat16 and the like as integers of that size."""
    about = _describe(value)
    data = np.asarray(random.key_data(value) if _is_key(value) else value)
    return (data if data.dtype.isbuiltin == 1 else data.view(f"u{data.dtype.itemsize}")), about


def _decode(archive: zipfile.ZipFile, name: str, about: dict[str, Any]) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        data = np.lib.format.read_array(file, allow_pickle=False)
    return data if about["dtype"] == "key" else data.view(jnp.dtype(about["dtype"]))


def _to_jax(data: np.ndarray, about: dict[str, Any]) -> Array:
    """Return a copy on the device: the loop donates it."""
    array = jnp.array(data, copy=True)
    return random.wrap_key_data(array, impl=about["impl"]) if about["dtype"] == "key" else array


def _say(about: dict[str, Any] | None) -> str:
    return "nothing" if about is None else f"{about.get('impl', about['dtype'])} of shape {tuple(about['shape'])}"


def _write(file: Any, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write the archive, and over its comment, which ends the file, the checksum of all before."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = bytes(_SEAL_LENGTH)
        archive.writestr(zipfile.ZipInfo("header.json", _DATE), json.dumps(header, indent=1))
        for name, data in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _DATE), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, data, allow_pickle=False)
    file.seek(-_SEAL_LENGTH, os.SEEK_END)
    file.write(_SEAL + _digest(file, file.tell()))


def _digest(file: Any, size: int) -> bytes:
    """Return SHA-256 of the first ``size`` bytes, in hex; leave the file where they end."""
    file.seek(0)
    digest = hashlib.sha256()
    while size:
        block = file.read(min(size, 1 << 20))  # a mebibyte at a time
        digest.update(block)
        size -= len(block)
    file.seek(0, os.SEEK_CUR)  # a write may follow the reads
    return digest.hexdigest().encode()


def _check_seal(file: Any, path: Path) -> None:
    size = file.seek(0, os.SEEK_END) - _SEAL_LENGTH
    sealed = False
    if size > 0:
        file.seek(size)
        sealed = file.read() == _SEAL + _digest(file, size)
    if not sealed:
        raise CheckpointError(f"'{path}' is damaged or cut short: its checksum is wrong.")


def _check_version(header: Any, path: Path) -> None:
    if header["format"] != FORMAT:
        raise ValueError("its header says otherwise")
    if header["version"] != VERSION:
        written_by = header.get("releases", {}).get("numpyro_ebipla")
        raise CheckpointError(
            f"'{path}' has format version {header['version']} (numpyro_ebipla {written_by}), and this "
            f"numpyro_ebipla reads version {VERSION}: read it with that release."
        )


def _sync_directory(directory: Path) -> None:
    """Make a rename last through a power cut; Windows cannot, nor can some file systems."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
