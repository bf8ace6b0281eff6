"""``python -m benchmarks.suite [NAMES…]``: default fits of models whose optimum is known, in one table."""

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from benchmarks.report import RESULTS, keep


def main(argv: list[str] | None = None) -> None:
    """Parse, run, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAMES", help="cases, by default all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS / "suite", help="files to write, without their suffix")
    args = parser.parse_args(argv)
    # Before JAX is imported, here and in the workers: one thread for XLA and for NumPy. Two processes on two cores are
    # faster so than with a pool of threads each.
    os.environ.setdefault("NPROC", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")
    from benchmarks.suite import cases, table, worker

    names = args.names or cases.NAMES
    if unknown := set(names) - set(cases.NAMES):
        parser.error(f"no case {sorted(unknown)}; there are {cases.NAMES}")
    start, outcomes = time.time(), {}
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting = {pool.submit(worker.work, name, args.seeds, not args.no_baselines): name for name in names}
        for done in as_completed(waiting):
            outcomes[waiting[done]] = done.result()
            print("| " + " | ".join(map(str, table.row(done.result()))) + " |", flush=True)
    report = table.report([outcomes[name] for name in names])
    keep(report, args.out, f"{args.seeds} seeds, defaults", time.time() - start)


if __name__ == "__main__":
    main()
