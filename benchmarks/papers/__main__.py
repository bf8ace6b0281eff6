"""``python -m benchmarks.papers NAME [--full]``; ``all`` runs every experiment."""

import argparse
import importlib
import time
import traceback

import matplotlib

from benchmarks.report import RESULTS, keep

#: Experiments, cheapest first: each module has ``run(full, seed, data_dir) -> Report``.
NAMES = [
    "toy_hierarchy",
    "error_model",
    "logistic",
    "mixture_ebm",
    "bnn",
    "latent_ebm",
    "mnist_ebm",
]


def main(argv: list[str] | None = None) -> None:
    """Parse, run, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*NAMES, "all"])
    parser.add_argument("--full", action="store_true", help="the paper's own size (hours on two cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", default=None, help="where data files are (see each experiment)")
    args = parser.parse_args(argv)
    matplotlib.use("Agg")
    failed = {}
    for name in NAMES if args.name == "all" else [args.name]:
        try:
            run(name, args.full, args.seed, args.data_dir)
        except Exception as error:  # the others may well run, such as those that need no data files
            traceback.print_exc()
            failed[name] = error
    if failed:
        raise SystemExit("\n".join(f"{name} failed: {error!r}" for name, error in failed.items()))


def run(name: str, full: bool, seed: int, data_dir: str | None) -> None:
    """One experiment, and its report kept."""
    experiment = importlib.import_module(f"benchmarks.papers.{name}")
    start = time.time()
    report = experiment.run(full, seed, data_dir)
    keep(report, RESULTS / (f"{name}_full" if full else name), "full" if full else "reduced", time.time() - start)


if __name__ == "__main__":
    main()
