"""What a process of the pool does; not in ``__main__``, whose functions a spawned process cannot find."""

from typing import Any

from benchmarks.suite import baselines, cases, judge


def work(name: str, seeds: int, with_baselines: bool) -> dict[str, Any]:
    """All runs of a case, and what one would run instead."""
    case = cases.make(name)
    runs = judge.run(case, seeds)
    kept = {"name": name, "threshold": case.threshold, "optimum": case.optimum, "num_data": case.num_data}
    if with_baselines:
        sds = case.posterior(runs[0]["params"], case.compared())[1]
        kept["svi"] = baselines.svi(case, 0)
        kept["unadjusted"] = baselines.unadjusted(case, 0, float(sds.min()) ** 2)
    return {**kept, "runs": [{k: v for k, v in run.items() if k != "params"} for run in runs]}
