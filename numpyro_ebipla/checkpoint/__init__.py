"""Checkpoints: a run's state and history in one file, written whole or not at all, read without pickle.

A file is a zip archive of ``.npy`` arrays that :func:`numpy.load` opens, with a ``header.json``; its last 71 bytes
are a checksum of all before them. The docs' page on checkpoints describes the format.

>>> import tempfile
>>> from pathlib import Path
>>> import jax, jax.numpy as jnp, numpy as np
>>> from numpyro_ebipla.checkpoint import latest, load, restore, save
>>> state = {"w": jnp.arange(3.0, dtype=jnp.bfloat16), "key": jax.random.key(1)}
>>> with tempfile.TemporaryDirectory() as directory:
...     path = save(Path(directory) / "step_000000000007.npz", state, {"contrast": np.zeros(7)}, {"step": 7})
...     found = load(latest(directory))
>>> found.header["step"], found.history["contrast"].shape
(7, (7,))
>>> restore(found, state)["w"]
Array([0, 1, 2], dtype=bfloat16)
"""

from numpyro_ebipla.checkpoint.files import Checkpoint, fingerprint, latest, list_checkpoints, load, restore, save

__all__ = [
    "Checkpoint",
    "fingerprint",
    "latest",
    "list_checkpoints",
    "load",
    "restore",
    "save",
]
