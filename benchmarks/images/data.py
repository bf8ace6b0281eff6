"""Images from the files in which they are published.

``mnist``: ``train-images-idx3-ubyte`` and the like, also gzipped. ``cifar10``: the binary version, ``data_batch_1.bin``
to ``test_batch.bin``. ``svhn``: ``train_32x32.mat`` and ``test_32x32.mat``. ``celeba``: a folder ``img_align_celeba``
of JPEGs, cropped to the middle 140 pixels and scaled to 64. For each an ``.npz`` will do, ``NAME*.npz``, with arrays
``images`` and ``labels``, or ``train_images``, ``train_labels``, ``test_images`` and ``test_labels``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.images import read

#: Of one array of images, and of faces, the share that is held out.
HELD_OUT = 0.2
#: Pixels of a face that are kept, and the side that they are scaled to.
CROP, SIDE = 140, 64
CIFAR_BYTES = 1 + 3 * 32 * 32


class Images(NamedTuple):
    """Bytes ``[n, height, width, channels]``, and labels ``[n]`` where there are some."""

    train: np.ndarray
    test: np.ndarray
    train_labels: np.ndarray | None = None
    test_labels: np.ndarray | None = None

    def first(self, train: int | None, test: int | None) -> "Images":
        """Return so many of each."""
        cut = lambda x, n: x if x is None else x[:n]
        return Images(self.train[:train], self.test[:test], cut(self.train_labels, train), cut(self.test_labels, test))


def load(name: str, folder: Path) -> Images:
    """Return the images of a data set.

    Raises:
        SystemExit: saying which file is missing or damaged.
    """
    if not folder.is_dir():
        raise SystemExit(f"--data-dir {folder}: there is no such folder.")
    archives = sorted(folder.glob(f"{name}*.npz"))
    images = _archive(archives[0]) if archives else READERS[name](folder)
    for part in (images.train, images.test):
        if part.dtype != np.uint8 or part.ndim != 4 or not len(part):
            raise SystemExit(f"{name}: images must be bytes [n, height, width, channels], got {part.shape}.")
    return images


def _archive(path: Path) -> Images:
    arrays = dict(np.load(path))
    if "images" in arrays:
        return _split(_four(arrays["images"]), arrays.get("labels"))
    if not {"train_images", "test_images"} <= set(arrays):
        raise SystemExit(f"{path}: no arrays 'images', or 'train_images' and 'test_images'; there are {[*arrays]}.")
    labels = arrays.get("train_labels"), arrays.get("test_labels")
    return Images(_four(arrays["train_images"]), _four(arrays["test_images"]), *labels)


def _split(images: np.ndarray, labels: np.ndarray | None) -> Images:
    order = np.random.RandomState(0).permutation(len(images))
    train, test = np.split(order, [round(len(images) * (1 - HELD_OUT))])
    of = lambda at: None if labels is None else labels[at]
    return Images(images[train], images[test], of(train), of(test))


def _mnist(folder: Path) -> Images:
    def read_part(name: str) -> np.ndarray:
        return read(_find(folder, f"{name}-ubyte", f"{name}-ubyte.gz"))

    train, labels, test, test_labels = (
        read_part(f"{part}-{what}") for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")
    )
    return Images(_four(train), _four(test), labels, test_labels)


def _cifar10(folder: Path) -> Images:
    def read_part(name: str) -> tuple[np.ndarray, np.ndarray]:
        path = _find(folder, name)
        raw = np.frombuffer(path.read_bytes(), np.uint8)
        if not raw.size or raw.size % CIFAR_BYTES:
            raise SystemExit(f"{path}: {raw.size} bytes are no whole number of images of {CIFAR_BYTES}.")
        rows = raw.reshape(-1, CIFAR_BYTES)
        return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]

    batches = [read_part(f"data_batch_{i}.bin") for i in range(1, 6)]
    test, test_labels = read_part("test_batch.bin")
    train, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return Images(train, test, labels, test_labels)


def _svhn(folder: Path) -> Images:
    from scipy.io import loadmat

    def read_part(name: str) -> tuple[np.ndarray, np.ndarray]:
        path = _find(folder, name)
        try:
            found = loadmat(path)
            return found["X"].transpose(3, 0, 1, 2), found["y"].ravel() % 10  # ten stands for the digit nought
        except (ValueError, KeyError, TypeError, EOFError, OSError) as error:
            raise SystemExit(f"{path}: not a whole .mat file with 'X' and 'y' ({error}).") from error

    (train, labels), (test, test_labels) = read_part("train_32x32.mat"), read_part("test_32x32.mat")
    return Images(train, test, labels, test_labels)


def _celeba(folder: Path) -> Images:
    from PIL import Image

    paths = sorted((folder / "img_align_celeba").glob("*.jpg"))
    if not paths:
        raise SystemExit(f"{folder}: there is no folder img_align_celeba with JPEGs.")

    def read_face(path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                left, top = ((side - CROP) // 2 for side in image.size)
                return np.asarray(image.convert("RGB").crop((left, top, left + CROP, top + CROP)).resize((SIDE, SIDE)))
        except OSError as error:
            raise SystemExit(f"{path}: not a whole JPEG ({error}).") from error

    return _split(np.stack([read_face(path) for path in paths]), None)


def _find(folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise SystemExit(f"{folder / names[0]}: there is no such file.")


def _four(images: np.ndarray) -> np.ndarray:
    return images[..., None] if images.ndim == 3 else images


READERS: dict[str, Callable[[Path], Images]] = {
    "mnist": _mnist,
    "cifar10": _cifar10,
    "svhn": _svhn,
    "celeba": _celeba,
}
