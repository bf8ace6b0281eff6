"""The suite's report: one row per case, a dot plot, and how often the fit's own diagnosis is wrong."""

from typing import Any

import numpy as np

from benchmarks.report import Report
from benchmarks.suite.judge import ALLOWED, LARGEST_SE, MOST_OFF, POSTERIOR_THRESHOLD
from numpyro_ebipla.diagnostics.parameters import LEFT_IN_ALL
from numpyro_ebipla.training.newton import ARRIVED

HEADER = (
    "case",
    "nats above optimum, median",
    "worst",
    "target",
    "posterior error (sds)",
    "without allowance",
    "its standard error",
    "frozen chains",
    "failures",
    "seconds: first, later",
    "SVI",
    "unadjusted EBIPLA (step)",
)
#: The plot's range, and the baselines in it.
LEAST, MOST = 1e-5, 1e3
OTHERS = {"svi": ("SVI", "^"), "unadjusted": ("unadjusted EBIPLA", "s")}


def report(outcomes: list[dict[str, Any]]) -> Report:
    """From what :func:`benchmarks.suite.worker.work` returns for each case."""
    runs = [run for outcome in outcomes for run in outcome["runs"]]
    failures = sum(not run["met"] for run in runs)
    rows = [row(outcome) for outcome in outcomes]
    data = {"cases": outcomes, "failures": failures, "runs": len(runs)}
    notes = [
        f"{len(runs) - failures} of {len(runs)} runs met their targets: nats per datum above the optimum, and a "
        f"posterior error of at most {POSTERIOR_THRESHOLD}. Mixed models, which start from zeros and ones, are judged "
        f"in total, and no parameter may be more than {MOST_OFF} standard errors from the optimum; the worst was "
        f"{max(run['off'] for run in runs):.3f} off.",
        "A datum is an element of the data plate. Optimum: the maximum of the exact marginal likelihood over the "
        "parameters; for the five latent energies in the plane that of the true density, on held-out data.",
        "Posterior error: the worst of at most 100 latents, of means in posterior sds and of log sds, beyond "
        f"{ALLOWED} standard errors of the draws (each of at most {LARGEST_SE}), against the exact posterior at the "
        "fitted parameters. Then the same without that allowance, and the largest standard error. Frozen: chains of "
        "any datum, compared or not, that never moved while draws were collected; none is allowed.",
        "Root mean square of the same errors over the latents, less the mean squared standard error (what they have in "
        f"common): at most {max(_errors(runs, 'rms_')):.3f} in any run.",
        "SVI: Adam, the better of guides with diagonal and full covariance; Gaussian priors in place of energies, in "
        "the plane with an encoder. Unadjusted EBIPLA: the paper's, at the best of three fixed steps, given as a "
        "fraction of what is stable for the narrowest posterior; without an energy, the same less the walkers. Seed 0; "
        "nats above the optimum.",
        *told(outcomes),
    ]
    title = "Suite: defaults against models whose optimum is known"
    return Report(title, rows, data, figure(outcomes), tuple(notes), HEADER)


def row(outcome: dict[str, Any]) -> tuple:
    runs = outcome["runs"]
    excess = [run["excess"] for run in runs]
    later = [run["seconds"] for run in runs[1:]]
    seconds = f"{runs[0]['seconds']:.0f}, {np.median(later):.0f}" if later else f"{runs[0]['seconds']:.0f}"
    svi = outcome.get("svi")
    return (
        outcome["name"],
        _nats(np.median(excess)),
        _nats(max(excess)),
        outcome["threshold"],
        f"{max(_errors(runs, '')):.2f}",
        f"{max(_errors(runs, 'raw_')):.2f}",
        f"{max(_errors(runs, 'se_')):.2f}",
        max(run["frozen"] for run in runs),
        f"{sum(not run['met'] for run in runs)} of {len(runs)}",
        seconds,
        _nats(svi["excess"]) if svi else "–",
        _unadjusted(outcome.get("unadjusted")),
    )


def _errors(runs: list[dict[str, Any]], prefix: str) -> list[float]:
    """The larger of the errors of means and of log sds, of each run."""
    return [max(run["posterior"][prefix + k] for k in ("mean", "log_sd")) for run in runs]


def _unadjusted(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    return _nats(found["excess"]) + (f" ({found['fraction']:g})" if np.isfinite(found["excess"]) else "")


def ended(run: dict[str, Any]) -> bool:
    """Return whether a run ended for another reason than that it had arrived."""
    return bool(run["stopped"]) and not run["stopped"].startswith(ARRIVED)


def told(outcomes: list[dict[str, Any]]) -> list[str]:
    """What the fits said about themselves, and whether it was right."""
    runs = [run for outcome in outcomes for run in outcome["runs"]]
    stopped = [f"{o['name']}, seed {r['seed']}: {r['stopped']}" for o in outcomes for r in o["runs"] if ended(r)]
    judged = [run for run in runs if not ended(run)]
    alarmed = [run for run in judged if run["met"] and run["alarms"]]
    true = sum(run["in_all"] > LEFT_IN_ALL.limit for run in alarmed)
    missed = sum(not run["met"] and not run["alarms"] for run in judged)
    failed = sum(not run["met"] for run in judged)
    lines = [
        f"`fit.diagnostics()`: {missed} misses in {failed} failed runs that ended; {len(alarmed)} alarms in "
        f"{len(judged) - failed} sound ones. Of these, {true} are true all the same, as the run is more than "
        f"{LEFT_IN_ALL.limit} nats in total from the optimum, where the diagnostics draw their line, and "
        f"{len(alarmed) - true} are false."
    ]
    for outcome in outcomes:
        said: dict[str, list[str]] = {}
        for run in outcome["runs"]:
            for name, value in (run["alarms"] or {}).items():
                said.setdefault(name, []).append(f"{value:.2g} (seed {run['seed']})")
        lines += [f"{outcome['name']}: {name} {', '.join(values)}" for name, values in said.items()]
    return lines + stopped


def _nats(value: float) -> str:
    if not np.isfinite(value):
        return "diverged"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.4f}" if abs(value) < 10 else f"{value:.3g}"


def figure(outcomes: list[dict[str, Any]]) -> Any:
    """Every run as a dot, for both targets."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(12, 1.6 + 0.32 * len(outcomes)), sharey=True, layout="constrained")
    for i, outcome in enumerate(outcomes):
        runs = outcome["runs"]
        excess, limits = [run["excess"] for run in runs], (outcome["threshold"], POSTERIOR_THRESHOLD)
        for axis, values, limit in zip(axes, (excess, _errors(runs, "")), limits, strict=True):
            axis.plot([limit, limit], [i - 0.45, i + 0.45], color="C3", lw=1.5, label="target" if i == 0 else None)
            _dots(axis, i, values, "o", 22, c=["C0" if value <= limit else "C3" for value in values])
        _dots(axes[1], i, _errors(runs, "raw_"), "o", 30, facecolors="none", edgecolors="0.5")
        for key, (label, marker) in OTHERS.items():
            if outcome.get(key):
                _dots(
                    axes[0], i, [outcome[key]["excess"]], marker, 26, facecolors="none", edgecolors="0.4", label=label
                )
    titles = (
        "Nats above the optimum, per datum (mixed models: in total)",
        "Posterior error in sds (hollow: with Monte Carlo error)",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xscale="log", xlim=(LEAST / 1.5, 1.5 * MOST), title=title)
        axis.set_xlabel(f"what is below {LEAST:g} or above {MOST:g} is shown there")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_yticks(range(len(outcomes)), [outcome["name"] for outcome in outcomes])
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    kinds = dict(zip(labels, handles, strict=True))
    fig.legend(kinds.values(), kinds.keys(), loc="outside lower center", ncols=3, fontsize=9)
    fig.suptitle("Default fits: every dot is a run, red ones miss their target (bar)")
    return fig


def _dots(axis: Any, row: int, values: list[float], marker: str, size: int, **style: Any) -> None:
    shown = np.clip(np.nan_to_num(values, nan=MOST, posinf=MOST), LEAST, MOST)
    axis.scatter(shown, np.full(len(shown), row), s=size, marker=marker, zorder=3, **style)
