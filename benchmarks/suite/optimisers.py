"""``python -m benchmarks.suite.optimisers``: the default optimiser against Adam, trust ratios, learning-rate-free ones.

Everything else is the default. Each has its authors' settings; Adam has the schedule of the default.
"""

import argparse
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from optax import contrib

from benchmarks.report import RESULTS, Report, keep
from benchmarks.suite import cases
from numpyro_ebipla import EBIPLA

#: Cases that take seconds, in the units that they were made for and in others.
CASES = (
    "components",
    "components_x1e-3",
    "components_x1e3",
    "toy_hierarchy_x1e2",
    "eight_schools",
    "pca",
    "quadratic_energy",
)
OPTIMISERS: dict[str, Callable | None] = {
    "default": None,
    "Adam, 0.01/√(1 + k/1000)": lambda: optax.adam(lambda k: 1e-2 / jnp.sqrt(1 + k / 1000)),
    "Adam by trust ratios (LAMB), 0.01/√(1 + k/1000)": lambda: optax.lamb(lambda k: 1e-2 / jnp.sqrt(1 + k / 1000)),
    "Prodigy": lambda: contrib.prodigy(1.0),
    "DoWG": contrib.dowg,
    "COCOB": contrib.cocob,
    "schedule-free Adam, 0.01": lambda: contrib.schedule_free_adamw(1e-2, warmup_steps=100),
}


def excess(name: str, make: Callable | None, seed: int) -> float:
    """Nats per datum above the optimum; infinite where the fit failed."""
    case = cases.make(name)
    ebipla = EBIPLA(case.model, num_samples=2, optim=make and make())
    try:
        fit = ebipla.run(random.key(seed), *case.args, progress_bar=False, **case.kwargs)
        value = case.optimum - case.value(fit.params)
    except (ValueError, FloatingPointError, TypeError) as e:
        print(f"{name}: {e}")
        return float("inf")
    return float(value) if np.isfinite(value) else float("inf")


def run(names: tuple[str, ...], seed: int) -> Report:
    """All of them on all cases."""
    found = {label: [excess(name, make, seed) for name in names] for label, make in OPTIMISERS.items()}
    rows = [(label, *(f"{max(v, 0):.1e}" for v in values)) for label, values in found.items()]
    notes = ("Nats per datum above the optimum after 5,000 steps; the target is 0.01. One seed.",)
    title = "Optimisers on models of known optimum"
    return Report(title, rows, {"excess": found}, figure(names, found), notes, ("", *names))


def figure(names: tuple[str, ...], found: dict[str, list[float]]) -> object:
    """A marker for each optimiser and case."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for i, (label, values) in enumerate(found.items()):
        shown = np.clip(values, 1e-7, 1e4)
        y = np.arange(len(names)) + 0.1 * (i - (len(found) - 1) / 2)
        ax.plot(shown, y, "osDv^PX"[i % 7], label=label, ms=8 if i == 0 else 6)
    ax.axvline(0.01, color="C3", lw=1)
    ax.text(0.01, -0.62, " target", color="C3", va="center")
    ax.set(
        xscale="log",
        xlabel="nats per datum above the optimum (cut at 1e-7 and 1e4)",
        title="5,000 steps, defaults but for the optimiser",
    )
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.8)
    ax.grid(axis="y", alpha=0.3)
    fig.legend(loc="outside lower center", ncols=3, fontsize=9)
    return fig


def main() -> None:
    """Parse, run, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.time()
    keep(run(CASES, args.seed), RESULTS / "optimisers", f"seed {args.seed}", time.time() - start)


if __name__ == "__main__":
    main()
