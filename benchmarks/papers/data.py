"""Data files of the experiments.

Looked for in ``--data-dir``, else in the environment's ``EBIPLA_DATA_DIR``, else in ``../shared/data`` beside the
repository.
"""

import os
from pathlib import Path

import numpy as np

_BESIDE = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def find(name: str, data_dir: str | None) -> Path:
    """Where a data file is.

    Raises:
        FileNotFoundError: naming the place that was looked at.
    """
    place = Path(data_dir or os.environ.get("EBIPLA_DATA_DIR") or _BESIDE)
    if not (place / name).is_file():
        raise FileNotFoundError(f"{name} is not in {place}: say where it is by --data-dir or EBIPLA_DATA_DIR.")
    return place / name


def mnist(data_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """10,000 images of MNIST: ``images [n, 28, 28]`` float32 in [0, 1] and ``labels [n]``.

    From ``mnist_10k.npz`` with ``images`` (uint8) and ``labels``. Its halves differ: shuffle before a split.
    """
    with np.load(find("mnist_10k.npz", data_dir)) as file:
        return file["images"].astype(np.float32) / 255, file["labels"].astype(np.int32)
