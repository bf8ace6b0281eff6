"""``python -m benchmarks.images mnist --data-dir DIR``; ``make images`` runs the reduced form on MNIST.

Each system trains for the same seconds. Judged are draws of the prior, decoded, against held-out images (Fréchet
distances), and reconstructions of held-out images, by chains at the fitted generator under a Gaussian prior for all.
"""

import argparse
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from jax import random

from benchmarks.images.data import READERS, Images, load
from benchmarks.images.metrics import Judge, train_judge
from benchmarks.images.networks import Generator, make_model, scaled
from benchmarks.images.systems import NAMES, Look, Task, train
from benchmarks.report import RESULTS, Report, keep
from numpyro_ebipla import EBIPLA, EBIPLAWarning

#: Draws whose moments are compared, and held-out images that are reconstructed.
NUM_DRAWS, RECONSTRUCTED = 2000, 100
SHOWN, IN_ROW = 40, 5
#: Numbers of the judging keys: no seed of a fit.
KEY_DRAW, KEY_POSTERIOR = 1001, 1002


class Judges(NamedTuple):
    """What all systems are judged by, compiled once.

    Attributes:
        draws: of generated images.
        decode: ``(weights, latents) -> images``.
        gaussian: the model with a Gaussian prior, for reconstructions.
        test: held-out bytes.
    """

    draws: Judge
    decode: Callable
    gaussian: EBIPLA
    test: np.ndarray


def main(argv: list[str] | None = None) -> None:
    """Parse, run, keep."""
    args = parse(argv)
    matplotlib.use("Agg")
    begun = time.time()
    images = load(args.name, Path(args.data_dir)).first(args.limit, None)
    report = compare(args, images)
    mode = f"{args.seconds:.0f} s each, width {args.width}, {args.latents} latents, {len(images.train)} images"
    keep(report, RESULTS / f"images_{args.name}", f"{mode}, {args.seeds} seeds", time.time() - begun)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*READERS])
    parser.add_argument("--data-dir", required=True, help="where the files are (see benchmarks/images/data.py)")
    parser.add_argument("--seconds", type=float, default=60, help="of training, for each system (default 60)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=16, help="channels before the last layer (default 16)")
    parser.add_argument("--latents", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--limit", type=int, default=8000, help="images to train on, at most (default 8000)")
    parser.add_argument("--systems", nargs="+", choices=NAMES, default=[*NAMES])
    return parser.parse_args(argv)


def compare(args: argparse.Namespace, images: Images) -> Report:
    """Train all systems with all seeds, and judge them at a quarter, half and all of the time."""
    train_images, test = scaled(images.train.astype(np.float32)), scaled(images.test.astype(np.float32))
    judge = train_judge(train_images, images.train_labels)
    floor = judge.distances(train_images[:NUM_DRAWS], test[:NUM_DRAWS])
    shape = images.train.shape[1:]
    generator = Generator(shape, args.width)
    decode = jax.jit(lambda params, x: generator.apply({"params": params}, x))
    gaussian = EBIPLA(make_model(shape, args.latents, args.width, energy_based=False))
    judges = Judges(judge, decode, gaussian, images.test)
    looks = tuple(args.seconds * share for share in (0.25, 0.5, 1.0))
    curves: dict[str, list] = {name: [] for name in args.systems}
    shown: dict[str, np.ndarray] = {"held-out images": images.test[:SHOWN]}
    for seed in range(args.seeds):
        task = Task(images.train, args.latents, args.width, args.batch_size, looks, seed)
        for name in args.systems:
            course = []
            for look in train(name, task):
                generated, row = assess(look, judges)
                course.append(row)
                print(f"{name}, seed {seed}: {row}", flush=True)
            curves[name].append(course)
            shown.setdefault(name, to_bytes(generated[:SHOWN]))
    rows = [("real images", *floor.values(), "", "", "")]
    rows += [(name, *spread(courses)) for name, courses in curves.items()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    notes = (
        "Fréchet distances: in 50 principal components, and in the last hidden layer of a classifier of the labels; of "
        f'{NUM_DRAWS} draws to the held-out images. "Real images" are training images: the floor.',
        "Held-out error: squared, of a pixel on the scale from −1 to 1, by chains at the fitted generator under a "
        "Gaussian prior, the same for all.",
        f"Medians over the seeds, with the lowest and highest; {jax.default_backend()}; peak memory {peak:.1f} GiB.",
    )
    header = ("system", *(f"Fréchet, {name}" for name in floor), "held-out error", "ms per step", "particles")
    settings = {**vars(args), "curves": curves, "floor": floor}
    del settings["data_dir"]  # of this machine
    return Report(f"Images: {args.name}", rows, settings, draw_figure(curves, shown, floor), notes, header)


def assess(look: Look, judges: Judges) -> tuple[np.ndarray, dict[str, float]]:
    """Return generated images, and figures of a system as it stands."""
    weights = look.params["generator$params"]
    x = look.draw(random.key(KEY_DRAW), NUM_DRAWS)
    generated = np.concatenate([np.asarray(judges.decode(weights, part)) for part in jnp.split(x, 10)])
    held_out = judges.test[:RECONSTRUCTED]
    with warnings.catch_warnings():  # under a generator that has hardly begun chains do not settle, as the error shows
        warnings.simplefilter("ignore", EBIPLAWarning)
        params = {"generator$params": weights}
        found = judges.gaussian.reconstruct(random.key(KEY_POSTERIOR), params, held_out)["image"]
    row = {
        "seconds": look.seconds,
        "steps": look.steps,
        **judges.draws.distances(generated, scaled(judges.test[:NUM_DRAWS])),
        "error": float(((found - scaled(held_out)) ** 2).mean()),
        "particles": look.particles,
        "barrier": float(look.history["x/barrier"][-1]) if "x/barrier" in look.history else None,
    }
    return generated, row


def spread(courses: list[list[dict]]) -> tuple:
    """Cells of a row: medians at the end, with extremes."""
    last = [course[-1] for course in courses]

    def cell(name: str, digits: int) -> str:
        values = np.array([row[name] for row in last])
        return f"{np.median(values):.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"

    per_step = np.median([1e3 * row["seconds"] / row["steps"] for row in last])
    distances = [cell(name, 2) for name in ("components", "features") if name in last[0]]
    return *distances, cell("error", 4), f"{per_step:.0f}", last[0]["particles"] or "–"


def to_bytes(images: np.ndarray) -> np.ndarray:
    """From −1 to 1 to bytes."""
    return np.clip((images + 1) * 127.5, 0, 255).astype(np.uint8)


def draw_figure(curves: dict[str, list], shown: dict[str, np.ndarray], floor: dict[str, float]) -> plt.Figure:
    """Samples of each system side by side, and distances and errors against seconds."""
    columns = max(len(shown), len(floor) + 1)
    figure = plt.figure(figsize=(2.6 * columns, 7.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1])
    for ax, (name, images) in zip(np.ravel(above.subplots(1, len(shown))), shown.items(), strict=True):
        rows = [np.concatenate(images[i : i + IN_ROW], 1) for i in range(0, SHOWN, IN_ROW)]
        sheet = np.concatenate(rows)
        ax.imshow(sheet[..., 0] if sheet.shape[-1] == 1 else sheet, cmap="gray")
        ax.set_title(name, fontsize=9)
        ax.axis("off")
    titles = {"components": "Fréchet distance, 50 components", "features": "Fréchet distance, features"}
    panels = {**{name: titles[name] for name in floor}, "error": "held-out squared error"}
    for ax, (what, title) in zip(np.ravel(below.subplots(1, len(panels))), panels.items(), strict=True):
        for i, (name, courses) in enumerate(curves.items()):
            for j, course in enumerate(courses):
                seconds, values = zip(*[(row["seconds"], row[what]) for row in course], strict=True)
                ax.loglog(seconds, values, f"C{i}o-", ms=3, lw=1, label=name if j == 0 else None)
        if what in floor:
            ax.axhline(floor[what], color="black", ls=":", label="real images")
        ax.set(title=title, xlabel="seconds of training")
    ax.figure.legend(*below.axes[0].get_legend_handles_labels(), ncols=4, loc="outside lower center", fontsize=9)
    return figure


if __name__ == "__main__":
    main()
