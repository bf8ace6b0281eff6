"""Data files of the experiments: looked for in ``--data-dir``, else in ``../shared/data`` beside the repository."""

from pathlib import Path

import numpy as np

_BESIDE = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def find(name: str, data_dir: str | None) -> Path:
    """Where a data file is.

    Raises:
        FileNotFoundError: naming the places that were looked at.
    """
    places = [Path(data_dir)] if data_dir else [_BESIDE, Path.cwd().parent / "shared" / "data"]
    for place in places:
        if (place / name).is_file():
            return place / name
    looked = " or ".join(str(place) for place in places)
    raise FileNotFoundError(f"{name} is not in {looked}: say where it is by --data-dir.")


def mnist(data_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """10,000 images of MNIST: ``images [n, 28, 28]`` float32 in [0, 1] and ``labels [n]``.

    From ``mnist_10k.npz`` with ``images`` (uint8) and ``labels``. The halves of that file differ: shuffle before a split.
    """
    with np.load(find("mnist_10k.npz", data_dir)) as file:
        return file["images"].astype(np.float32) / 255, file["labels"].astype(np.int32)
