"""The image benchmark reads the published files, measures what it says, and runs in the small."""

import gzip

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.io
import scipy.linalg
from PIL import Image

from benchmarks.images import __main__ as program
from benchmarks.images.data import CROP, SIDE, load
from benchmarks.images.metrics import frechet, train_judge
from benchmarks.images.systems import DEFAULT, GUIDED, VAE

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, size=(20, 32, 32, 3)).astype(np.uint8)
LABELS = np.arange(20, dtype=np.uint8) % 10


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def write_mnist(folder):
    for part, n in (("train", 20), ("t10k", 5)):
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(BYTES[:n, :28, :28, 0].copy())))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(LABELS[:n]))
    return BYTES[:, :28, :28, :1]


def write_cifar10(folder):
    rows = np.concatenate([LABELS[:, None], BYTES.transpose(0, 3, 1, 2).reshape(20, -1)], 1)
    for i in range(5):
        (folder / f"data_batch_{i + 1}.bin").write_bytes(rows[4 * i : 4 * i + 4].tobytes())
    (folder / "test_batch.bin").write_bytes(rows[:5].tobytes())
    return BYTES


def write_svhn(folder):
    for part, n in (("train", 20), ("test", 5)):
        labels = np.where(LABELS[:n] == 0, 10, LABELS[:n])[:, None]
        scipy.io.savemat(folder / f"{part}_32x32.mat", {"X": BYTES[:n].transpose(1, 2, 3, 0), "y": labels})
    return BYTES


WRITERS = {"mnist": write_mnist, "cifar10": write_cifar10, "svhn": write_svhn}


@pytest.mark.unit
@pytest.mark.parametrize("name", WRITERS)
def test_published_files_are_read(name, tmp_path):
    expected = WRITERS[name](tmp_path)
    found = load(name, tmp_path)
    np.testing.assert_array_equal(found.train, expected)
    np.testing.assert_array_equal(found.test, expected[:5])
    np.testing.assert_array_equal(found.train_labels, LABELS)
    np.testing.assert_array_equal(found.test_labels, LABELS[:5])


@pytest.mark.unit
def test_faces_are_cropped_and_scaled(tmp_path):
    """A grey frame is cut off; of the middle, which changes from left to right, everything is there."""
    (tmp_path / "img_align_celeba").mkdir()
    face = np.full((218, 178, 3), 128, np.uint8)
    top, left = (218 - CROP) // 2, (178 - CROP) // 2
    face[top : top + CROP, left : left + CROP] = np.linspace(0, 255, CROP).astype(np.uint8)[:, None]
    for i in range(5):
        Image.fromarray(face).save(tmp_path / "img_align_celeba" / f"{i:06}.jpg", quality=95)
    found = load("celeba", tmp_path)
    assert found.train.shape == (4, SIDE, SIDE, 3) and found.test.shape == (1, SIDE, SIDE, 3)
    wanted = np.linspace(0, 255, SIDE)[:, None]
    assert np.abs(found.test[0].astype(float) - wanted).max() < 12  # JPEG, at the edges
    assert found.train_labels is None


@pytest.mark.unit
@pytest.mark.parametrize("name", WRITERS)
def test_damaged_and_missing_files_are_named(name, tmp_path):
    WRITERS[name](tmp_path)
    path = sorted(tmp_path.iterdir())[0]
    path.write_bytes(path.read_bytes()[:-7] if path.suffix != ".gz" else gzip.compress(b"\x00\x00\x08\x03"))
    with pytest.raises(SystemExit, match=path.name):
        load(name, tmp_path)
    path.unlink()
    with pytest.raises(SystemExit, match=path.name.removesuffix(".gz")):
        load(name, tmp_path)
    with pytest.raises(SystemExit, match="no such folder"):
        load(name, tmp_path / "nowhere")


@pytest.mark.unit
def test_archives(tmp_path):
    np.savez(tmp_path / "mnist_small.npz", images=BYTES[..., 0], labels=LABELS)
    found = load("mnist", tmp_path)
    assert found.train.shape == (16, 32, 32, 1) and found.test.shape == (4, 32, 32, 1)
    both = {x.tobytes() for x in [*found.train, *found.test]}
    assert both == {x.tobytes() for x in BYTES[..., :1]}
    np.savez(tmp_path / "svhn.npz", pictures=BYTES)
    with pytest.raises(SystemExit, match="no arrays 'images'"):
        load("svhn", tmp_path)


@pytest.mark.unit
def test_frechet_distances_are_those_of_normal_laws():
    """Against the formula with a matrix's root, and zero between a sample and itself."""
    x, y = RNG.normal(size=(500, 4)), RNG.normal(size=(400, 4)) @ RNG.normal(size=(4, 4)) + 1
    cov = np.cov(x.T), np.cov(y.T)
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sum(cov) - 2 * scipy.linalg.sqrtm(cov[0] @ cov[1]).real)
    assert abs(frechet(x, y) - wanted) < 1e-8 * wanted
    assert abs(frechet(x, x)) < 1e-9
    assert abs(frechet(x, x + 2) - 16) < 1e-9


@pytest.mark.unit
def test_a_judge_has_the_components_of_most_variance():
    images = (RNG.normal(size=(300, 8, 8, 1)) * np.linspace(0, 1, 64).reshape(8, 8, 1)).astype(np.float32)
    judge = train_judge(images, (images.sum((1, 2, 3)) > 0).astype(int))
    np.testing.assert_allclose(judge.components @ judge.components.T, np.eye(50), atol=1e-5)
    flat = images.reshape(300, -1)
    kept = judge.project(images).var(0).sum() / flat.var(0).sum()
    values = np.linalg.eigvalsh(np.cov(flat.T))
    assert abs(kept - values[-50:].sum() / values.sum()) < 1e-4
    assert judge.features(images).shape == (300, 64)
    assert set(judge.distances(images[:150], images[150:])) == {"components", "features"}


@pytest.mark.slow  # a minute of compilation
def test_a_small_comparison(tmp_path, monkeypatch):
    """One second each, of little images: rows, curves and a figure come out."""
    images = (BYTES.astype(float).repeat(6, 0) * 0.5)[:, :8, :8, :1].astype(np.uint8)
    np.savez(tmp_path / "mnist.npz", images=images, labels=LABELS.repeat(6))
    monkeypatch.setattr(program, "NUM_DRAWS", 60)
    monkeypatch.setattr(program, "RECONSTRUCTED", 4)
    monkeypatch.setattr(program, "SHOWN", 20)
    sizes = {"data-dir": tmp_path, "seconds": 1, "seeds": 1, "width": 2, "latents": 2, "batch-size": 16, "limit": 90}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    args = program.parse(["mnist", *options, "--systems", DEFAULT, GUIDED, VAE])
    report = program.compare(args, load("mnist", tmp_path))
    assert [row[0] for row in report.rows] == ["real images", DEFAULT, GUIDED, VAE]
    for courses in report.data["curves"].values():
        ((first, middle, last),) = courses
        assert 0 < first["steps"] < middle["steps"] < last["steps"]
        assert all(np.isfinite([row["components"], row["features"], row["error"]]).all() for row in courses[0])
    plt.close(report.figure)
