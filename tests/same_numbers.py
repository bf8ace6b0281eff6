"""Do two versions of the package give the same numbers, bit for bit?

Each of the fits below is a few steps of a small model with fixed keys. Together they pass through every strategy,
kernel and recipe, with and without subsampling, and go on from a saved state. All that they return is kept:
parameters, states, histories, draws, and what is computed from them afterwards.

    python tests/same_numbers.py record FILE.npz             with the package as it is imported
    python tests/same_numbers.py against COMMIT              this tree beside a commit's
    python tests/same_numbers.py compare FILE.npz OTHER.npz

Bits depend on the machine and on the releases of JAX and NumPyro: record both files in one place.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # quick to compile

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random

from numpyro_ebipla import EBIPLA, Annealing, EnergyPrior, nan_masked, recipes
from numpyro_ebipla.kernels import MALA, ULA, Underdamped
from numpyro_ebipla.particles import Particles, ShortRunParticles, SuccessiveParticles, WeightedParticles
from numpyro_ebipla.walkers import Annealed, Contrastive, Persistent, ShortRun, Tempered

ROOT = Path(__file__).parents[1]
NUM_DATA, NUM_STEPS = 12, 24
FEW_MOVES = Annealing(num_moves=2, stage_ess=0.98)


def data(width: int = 3) -> np.ndarray:
    """``[M, width]`` correlated numbers."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(NUM_DATA, 1)) + 0.5 * rng.normal(size=(NUM_DATA, width))).astype(np.float32)


# --- the models ---------------------------------------------------------------------------------------


def mlp(params: Any, x: jax.Array) -> jax.Array:
    """An energy of two layers."""
    return jnp.sum(jnp.tanh(x @ params["in"] + params["bias"]) * params["out"], -1)


def energy_params(num_inputs: int) -> Any:
    """Of :func:`mlp`."""
    keys = random.split(random.key(7), 2)
    weights = {"in": random.normal(keys[0], (num_inputs, 4)), "out": random.normal(keys[1], (4,))}
    return weights | {"bias": jnp.zeros(4)}


def latent_energy(y: Any, batch_size: int | None = None) -> None:
    """An energy prior under a linear decoder with learned noise."""
    weights = numpyro.param("energy", energy_params(2))
    decoder = numpyro.param("decoder", 0.3 * jnp.ones((2, 3)))
    noise = numpyro.param("noise", 0.5, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        batch = numpyro.subsample(y, event_dim=1)
        base = dist.Normal(0, 1).expand([2]).to_event(1)
        x = numpyro.sample("x", EnergyPrior(lambda x: mlp(weights, x), base, annealing=FEW_MOVES, num_walkers=32))
        numpyro.sample("y", dist.Normal(x @ decoder, noise).to_event(1), obs=batch)


def observed_energy(y: Any, batch_size: int | None = None) -> None:
    """An energy-based model of the data themselves."""
    weights = numpyro.param("energy", energy_params(3))
    base = dist.Normal(0, 2).expand([3]).to_event(1)
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        prior = EnergyPrior(lambda x: mlp(weights, x), base, annealing=FEW_MOVES, num_walkers=32)
        numpyro.sample("y", prior, obs=numpyro.subsample(y, event_dim=1))


def conditional_energy(y: Any, batch_size: int | None = None) -> None:
    """An energy prior that depends on a covariate."""
    slope = numpyro.param("slope", 0.3)
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        batch = numpyro.subsample(y, event_dim=1)
        covariate = batch[:, 0]
        base = dist.Normal(0, 1).expand([len(covariate)])
        x = numpyro.sample("x", EnergyPrior(lambda x: slope * covariate * x + 0.1 * x**2, base, annealing=FEW_MOVES))
        numpyro.sample("y", dist.Normal(x, 1), obs=batch[:, 1])


def hierarchy(y: Any, batch_size: int | None = None) -> None:
    """Local latents alone."""
    mean = numpyro.param("mean", 0.0)
    scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        batch = numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", dist.Normal(mean, scale).expand([2]).to_event(1))
        numpyro.deterministic("twice", 2 * x)
        numpyro.sample("y", dist.Normal(x.sum(-1, keepdims=True), 1).expand([*x.shape[:-1], 3]).to_event(1), obs=batch)


def with_global(y: Any, batch_size: int | None = None) -> None:
    """A global latent above local ones."""
    scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
    level = numpyro.sample("level", dist.Normal(0, 2))
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        batch = numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", dist.Normal(level, scale))
        numpyro.sample("y", dist.Normal(x[..., None], 1).expand([*x.shape, 3]).to_event(1), obs=batch)


# --- the fits -----------------------------------------------------------------------------------------


def arrays(fit: Any) -> dict[str, Any]:
    """All numbers of a fit, by name; the order of the state's fields does not count."""
    state = fit.state
    found = {"params": fit.params, "history": fit.history, "average": state.average, "slow": state.slow_average}
    found |= {"last": state.params, "optim": state.optim_state, "latents": tuple(state.posterior[:2])}
    found["walkers"] = {name: walkers.position for name, walkers in state.prior.items() if hasattr(walkers, "position")}
    if fit.draws is not None:
        found |= fit.draws._asdict()
    return found


def fitted(model: Callable, *, batch_size: int | None = None, recipe: Callable = EBIPLA, **options: Any) -> Any:
    """A short fit; what it says of itself is not looked at."""
    settings = {"num_particles": 5, "num_steps": NUM_STEPS, "num_samples": 6, "thinning": 2, "warmup": 8}
    system = recipe(model, **(settings | options), batch_size=batch_size)
    return system, system.run(random.key(3), data(), progress_bar=False)


def fit_only(model: Callable, **options: Any) -> Callable[[], dict[str, Any]]:
    """A case that is a fit and nothing else."""
    return lambda: arrays(fitted(model, **options)[1])


def everything(model: Callable, **options: Any) -> dict[str, Any]:
    """A fit, and all that can be asked of it."""
    ebipla, fit = fitted(model, **options)
    key, params = random.key(5), {**fit.params, **fit.state.mutable}
    found = {"fit": arrays(fit), "prior": fit.prior_samples()}
    found["checks"] = {check.name: check.value for check in fit.diagnostics().checks}
    found["log_z"] = {name: fit.log_normalizer(name) for name, site in fit.config.model.energies.items()}
    few: dict[str, Any] = {"num_particles": 16, "num_populations": 2, "annealing": Annealing(num_moves=2)}
    found["log_likelihood"] = tuple(ebipla.log_likelihood(key, params, data(), **few))
    if fit.draws is not None:
        found["reconstruct"] = ebipla.reconstruct(key, params, data(), num_particles=16)
        found["redrawn"] = ebipla.reconstruct(key, params, data(), num_draws=3, num_particles=16)
        found["infer"] = arrays(ebipla.infer(key, params, data()[::-1]))
        few |= {"num_particles": 8, "annealing": Annealing(num_moves=2, max_temps=40, stage_ess=0.7)}
        found["bidirectional"] = tuple(ebipla.bidirectional(key, params, data(), **few))
        groups = fit.to_arviz(log_likelihood=True, posterior_predictive=True)
        for group in ("log_likelihood", "posterior_predictive", "observed_data"):
            found[group] = {str(name): np.asarray(value) for name, value in groups[group].items()}
    return found


def resumed(model: Callable, **options: Any) -> dict[str, Any]:
    """Half of the steps, then the others; a run of all of them; and one that is checkpointed and read again."""
    ebipla, whole = fitted(model, **options)
    first = ebipla.run(random.key(3), data(), num_steps=NUM_STEPS // 2, progress_bar=False)
    rest = {"num_steps": NUM_STEPS - NUM_STEPS // 2, "progress_bar": False}
    second = ebipla.run(random.key(3), data(), init_state=first.state, **rest)
    with tempfile.TemporaryDirectory() as directory:
        kept = {"checkpoint_dir": directory, "checkpoint_every": 10, "progress_bar": False}
        ebipla.run(random.key(3), data(), num_steps=NUM_STEPS // 2, **kept)
        third = ebipla.run(random.key(3), data(), **kept)
    for other in (second, third):
        same = jax.tree.map(np.array_equal, arrays(whole)["last"], arrays(other)["last"])
        assert all(jax.tree.leaves(same)), "a resumed run differs from the whole one"
    return {"whole": arrays(whole), "second": arrays(second), "third": arrays(third)}


FIXED = MALA(0.3, precondition=False, adapt_step=False)
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "default": lambda: everything(latent_energy),
    "default, subsampled": lambda: everything(latent_energy, batch_size=5),
    "default, observed": lambda: everything(observed_energy),
    "conditional": lambda: everything(conditional_energy, batch_size=5),
    "local": lambda: everything(hierarchy, batch_size=5),
    "global": lambda: everything(with_global),
    "global, subsampled": fit_only(with_global, batch_size=5),
    "resumed": lambda: resumed(latent_energy, batch_size=5),
    "resumed, global": lambda: resumed(with_global, batch_size=5, num_moves=3),
    "missing": fit_only(nan_masked(hierarchy)),
    "annealed": fit_only(latent_energy, prior=Annealed(32), posterior=Particles(FIXED, num_moves=2)),
    "persistent": fit_only(latent_energy, prior=Persistent(32, num_moves=2), kernel=Underdamped(0.1)),
    "jarzynski": fit_only(latent_energy, prior=Persistent(32, ULA(0.05), weighted=True, num_passive=16), kernel=ULA()),
    "jarzynski, adjusted": fit_only(observed_energy, prior=Persistent(32, weighted=True, num_moves=2)),
    "short run": fit_only(latent_energy, prior=ShortRun(32, num_moves=3), posterior=ShortRunParticles(num_moves=3)),
    "contrastive": fit_only(latent_energy, prior=Contrastive(32, num_moves=2), posterior=SuccessiveParticles()),
    "weighted": lambda: everything(hierarchy, posterior=WeightedParticles(), averaging=None),
    "weighted, unadjusted": fit_only(hierarchy, posterior=WeightedParticles(ULA(0.05)), batch_size=5),
    "weighted, global": fit_only(with_global, posterior=WeightedParticles()),
    "long ladder": fit_only(latent_energy, prior=Tempered(16, num_rungs=5, num_moves=2, restraint=None, trust=None)),
    **{f"recipes.{name}": fit_only(hierarchy, recipe=getattr(recipes, name)) for name in ("ipla", "pgd", "soul")},
    **{f"recipes.{name}": fit_only(hierarchy, recipe=getattr(recipes, name)) for name in ("kiplmc", "jala_em")},
    "recipes.ebipla": fit_only(latent_energy, recipe=recipes.ebipla),
    "recipes.lebm": fit_only(latent_energy, recipe=recipes.lebm, batch_size=5),
    "recipes.pcd": fit_only(observed_energy, recipe=recipes.pcd),
    "recipes.cd": fit_only(observed_energy, recipe=recipes.cd, batch_size=5),
    "recipes.jarzynski_ebm": fit_only(observed_energy, recipe=recipes.jarzynski_ebm),
}


# --- recording and comparing --------------------------------------------------------------------------


def numbers(name: str) -> dict[str, np.ndarray]:
    """``{path: array}`` of a case."""
    warnings.simplefilter("ignore")
    leaves = jax.tree_util.tree_leaves_with_path(CASES[name]())
    return {f"{name}{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves}


def record(path: Path, names: list[str]) -> None:
    """Write the numbers of some cases, worked off in two processes."""
    found: dict[str, np.ndarray] = {}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for part in pool.map(numbers, names):
            found |= part
    np.savez(path, **found)


def differences(path: Path, other: Path) -> list[str]:
    """What is in one file only, or not the same in both, bit for bit."""
    with np.load(path) as ours, np.load(other) as theirs:
        found = [f"{name}: in one of them only" for name in sorted({*ours} ^ {*theirs})]
        for name in sorted({*ours} & {*theirs}):
            a, b = ours[name], theirs[name]
            if a.dtype != b.dtype or a.shape != b.shape:
                found.append(f"{name}: {a.dtype}{list(a.shape)} against {b.dtype}{list(b.shape)}")
            elif a.tobytes() != b.tobytes() and not np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
                found.append(f"{name}: off by up to {np.nanmax(abs(a.astype(float) - b)):.2g}")
    return found


def record_commit(commit: str, path: Path, names: list[str]) -> None:
    """The numbers of another commit's package, by the cases of this file."""
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, commit], cwd=ROOT, check=True)
        try:
            again = [sys.executable, __file__, "record", path, "--cases", *names]
            subprocess.run(again, env=os.environ | {"PYTHONPATH": str(tree)}, check=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


def main() -> None:
    """The command line; it fails where numbers differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare", "against"])
    parser.add_argument("what", nargs="+")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    args = parser.parse_args()
    if args.action == "record":
        record(Path(args.what[0]), args.cases)
        return
    if args.action == "compare":
        found = differences(*map(Path, args.what))
    else:
        with tempfile.TemporaryDirectory() as directory:
            here, there = Path(directory) / "here.npz", Path(directory) / "there.npz"
            record(here, args.cases)
            record_commit(args.what[0], there, args.cases)
            found = differences(here, there)
    print("\n".join(found) or "the same numbers, bit for bit")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
