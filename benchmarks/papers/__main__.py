"""``python -m benchmarks.papers NAME [--full]``; ``all`` runs every experiment."""

import argparse
import importlib
import time

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


def main() -> None:
    """Parse, run, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*NAMES, "all"])
    parser.add_argument("--full", action="store_true", help="the paper's own size (hours on two cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", default=None, help="where data files are (see each experiment)")
    args = parser.parse_args()
    matplotlib.use("Agg")
    for name in NAMES if args.name == "all" else [args.name]:
        experiment = importlib.import_module(f"benchmarks.papers.{name}")
        start = time.time()
        report = experiment.run(args.full, args.seed, args.data_dir)
        stem = RESULTS / (f"{name}_full" if args.full else name)
        keep(report, stem, "full" if args.full else "reduced", time.time() - start)


if __name__ == "__main__":
    main()
