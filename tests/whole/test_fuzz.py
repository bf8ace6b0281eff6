"""Random small models: each is fitted soundly, or refused by name before any long work.

A :class:`Spec` says what a model has, :func:`build` makes it, :func:`fault` says whether it must be refused and how.
"""

import math
import re
import traceback
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax import random
from numpyro import handlers
from numpyro.distributions import constraints

import numpyro_ebipla
from numpyro_ebipla import (
    EBIPLA,
    ULA,
    Annealed,
    Contrastive,
    EnergyPrior,
    Persistent,
    ShortRun,
    ShortRunParticles,
    SuccessiveParticles,
    Underdamped,
    WeightedParticles,
)  # fmt: skip

PACKAGE = Path(numpyro_ebipla.__file__).parent
N, S, STEPS, HALF = 3, 4, 12, 5
SIZES = {"data": 5, "second": 2}


class Latent(NamedTuple):
    """A latent site: the plates it is in, its prior or base, its energy if it has one, its length (0: a scalar).

    The axis of a ``loose`` one outside all plates is a batch shape instead of an event.
    """

    plates: tuple[str, ...]
    prior: str
    energy: str | None
    size: int
    loose: bool


class Spec(NamedTuple):
    """A model, and how to fit it. ``second`` is another plate, inside or outside the data plate."""

    latents: tuple[Latent, ...]
    observed: str
    obs_size: int
    params: tuple[tuple[str, tuple[int, ...]], ...]
    data: bool
    second: str | None
    batch_size: int | None
    second_size: int | None
    extras: frozenset[str]
    how: str


# --- from a spec to a model -------------------------------------------------------------------------------

PRIORS = {
    "normal": lambda n: dist.Normal(0, 1).expand(n),
    "positive": lambda n: dist.Gamma(2.0, 2.0).expand(n),
    "unit": lambda n: dist.Beta(2.0, 2.0).expand(n),
    "interval": lambda n: dist.Uniform(-1.0, 2.0).expand(n),
    "simplex": lambda n: dist.Dirichlet(jnp.ones(3)),
    "improper": lambda n: dist.ImproperUniform(constraints.real, n, ()),
    "discrete": lambda n: dist.Bernoulli(0.5).expand(n),
}
CONSTRAINTS = {
    "real": (constraints.real, 0.1),
    "positive": (constraints.positive, 0.5),
    "unit": (constraints.unit_interval, 0.5),
    "interval": (constraints.interval(-1.0, 1.0), 0.2),
    "simplex": (constraints.simplex, 0.5),  # the last axis has length 2
}
HOW = {
    "default": {},
    "unadjusted": {"kernel": ULA(0.01), "prior": ShortRun(8, num_moves=2)},
    "underdamped": {"kernel": Underdamped(0.05), "prior": Persistent(8)},
    "weighted": {"posterior": WeightedParticles(), "prior": Persistent(8, weighted=True)},
    "contrastive": {"posterior": ShortRunParticles(num_moves=2), "prior": Contrastive(8)},
    "annealed": {"posterior": SuccessiveParticles(), "prior": Annealed(8)},
}
LIKELIHOODS = {
    "normal": lambda eta: dist.Normal(eta, 1.0),
    "student": lambda eta: dist.StudentT(3.0, eta, 1.0),
    "gamma": lambda eta: dist.Gamma(2.0, jnp.exp(0.3 * eta)),
    "poisson": lambda eta: dist.Poisson(jnp.exp(0.3 * eta)),
    "bernoulli": lambda eta: dist.Bernoulli(logits=eta),
    "energy": lambda eta: EnergyPrior(lambda y: 0.3 * numpyro.param("b", 0.5) * y**2, dist.Normal(0, 1)),
}


def param(name, kind, shape):
    constraint, value = CONSTRAINTS[kind]
    return numpyro.param(name, jnp.full(shape, value), constraint=constraint)


def prior(latent, covariate, before):
    """The distribution at a latent site; an energy may depend on a covariate, or (a fault) on what came before."""
    base = PRIORS[latent.prior]((latent.size,) if latent.size else ())
    vector = latent.size and latent.prior != "simplex"
    base = base.to_event(1) if vector and not (latent.loose and not latent.plates) else base
    total = lambda x: x.sum(-1) if base.event_dim else x
    if latent.energy is None:
        return base
    a, shift = numpyro.param("a", 0.5), {"covariate": covariate, "latent": before}.get(latent.energy, 0.0)
    if latent.energy == "wrong shape":
        return EnergyPrior(lambda x: a * (total(x) ** 2)[..., None], base)
    return EnergyPrior(lambda x: 0.3 * a * (total(x) - shift) ** 2, base)


def build(spec):
    """``(model, args, kwargs)``."""
    dims = {"data": -2, "second": -1} if spec.second == "inside" else {"data": -1, "second": -2}
    present = {"data": spec.data, "second": spec.second is not None}
    present = {name: dim for name, dim in dims.items() if present[name]}

    def model(y, c, batch_size=None):
        batch = {"data": batch_size, "second": spec.second_size}
        plates = {n: numpyro.plate(n, SIZES[n], subsample_size=batch[n], dim=d) for n, d in present.items()}

        def inside(names, *others):
            stack = ExitStack()
            for plate in [*(plates[name] for name in sorted(names, key=dims.get) if name in plates), *others]:
                stack.enter_context(plate)
            return stack

        eta = sum((param(f"p{i}", *p).sum() for i, p in enumerate(spec.params)), start=jnp.zeros(()))
        hidden = [handlers.mask(mask=False)] if "mask latents" in spec.extras else []
        hidden += [handlers.scale(scale=0.5)] if "scale latents" in spec.extras else []
        for i, latent in enumerate(spec.latents):
            with inside(latent.plates, *hidden):
                covariate = numpyro.subsample(c[latent.plates[-1]], event_dim=0) if latent.plates else 0.0
                fn = prior(latent, covariate, eta)
                x = numpyro.sample(f"x{i}", fn)
            x = x.sum(-1) if fn.event_dim else x
            eta = eta + (x if latent.plates else x.sum())
        if "deterministic" in spec.extras:
            numpyro.deterministic("eta", eta)
        with inside(plates):
            if "factor" in spec.extras:
                numpyro.factor("factor", -0.1 * eta**2)
            known = numpyro.subsample(c["data"], event_dim=0) > 0.4
            seen = [handlers.mask(mask=known)] if "mask" in spec.extras else []
            seen += [handlers.scale(scale=2.0)] if "scale" in spec.extras else []
            with inside((), *seen):
                mean = eta[..., None] + jnp.zeros(spec.obs_size) if spec.obs_size else eta
                fn = LIKELIHOODS[spec.observed](mean)
                fn = fn.expand((spec.obs_size,)) if spec.obs_size and not fn.batch_shape else fn
                fn = fn.to_event(1) if spec.obs_size else fn
                numpyro.sample("y", fn, obs=numpyro.subsample(y, event_dim=min(spec.obs_size, 1)))
        if "coupled" in spec.extras:
            numpyro.factor("coupled", -0.1 * jnp.sum(eta) ** 2)

    lead = [SIZES[name] for name in sorted(present, key=dims.get)]
    shape = (*lead, *([spec.obs_size] if spec.obs_size else []))
    y = np.random.default_rng(0).gamma(2.0, size=shape).astype(np.float32)
    y = (y > 1).astype(np.int32) if spec.observed == "bernoulli" else y
    y = y.astype(np.int32) if spec.observed == "poisson" else y
    c = {name: np.linspace(0.2, 1.0, SIZES[name], dtype=np.float32) for name in SIZES}
    c = {name: c[name].reshape((-1,) + (1,) * (-dims[name] - 1)) if name in present else c[name][0] for name in c}
    return model, (y, c), {} if spec.batch_size is None else {"batch_size": spec.batch_size}


def shape_of(spec, latent):
    """Of one draw."""
    dims = ["data", "second"] if spec.second == "inside" else ["second", "data"]
    present = {"data": spec.data, "second": spec.second is not None}
    sizes = [SIZES[name] if name in latent.plates and present[name] else 1 for name in dims]
    while sizes and not (dims[-len(sizes)] in latent.plates and present[dims[-len(sizes)]]):
        sizes.pop(0)
    event = (3,) if latent.prior == "simplex" else (latent.size,) if latent.size else ()
    return (*sizes, *event)


def data_plate(spec):
    """The name of the plate that is subsampled, or has the most latent values in it."""
    present = {"data": spec.data, "second": spec.second is not None}
    sizes = {"data": spec.batch_size, "second": spec.second_size}

    def rank(name):
        values = sum(math.prod(shape_of(spec, latent)) for latent in spec.latents if name in latent.plates)
        return (sizes[name] or SIZES[name]) < SIZES[name], values, SIZES[name]

    return max((name for name in present if present[name]), key=rank, default=None)


def fault(spec):
    """What the error message must hold, None for a model that can be fitted."""
    sizes = {"data": spec.batch_size if spec.data else None, "second": spec.second_size if spec.second else None}
    for name, size in sizes.items():
        if size is not None and size > SIZES[name]:
            return f"'{name}' has subsample_size"
    for i, latent in enumerate(spec.latents):
        if latent.energy is not None:
            if latent.prior in ("discrete", "improper") or latent.energy == "wrong shape":
                return "EnergyPrior"
            if latent.energy == "latent" and i:
                return f"'x{i}' depends on|EnergyPrior: the energy"
    for i, latent in enumerate(spec.latents):
        if latent.prior == "discrete":
            return f"'x{i}' is discrete"
    if not spec.latents and spec.observed != "energy":
        return "nothing to do"
    subsampled = [name for name, size in sizes.items() if size is not None and size < SIZES[name]]
    if len(subsampled) == 2:
        return "all subsampled"
    for i, latent in enumerate(spec.latents):
        if latent.energy == "covariate" and latent.plates:
            if latent.plates[-1] == data_plate(spec) and not any(
                isinstance(HOW[spec.how].get("prior"), known) for known in (ShortRun, Annealed, type(None))
            ):
                return f"'x{i}' is conditional on covariates"
            # A batch of one datum looks like an axis that has nothing to do with the data.
            if latent.plates == ("data", "second") and spec.second == "outside" and spec.data and spec.batch_size == 1:
                return f"'x{i}' is conditional on the data plate and on another"
    if spec.how == "weighted" and subsampled and any(not set(subsampled) & set(x.plates) for x in spec.latents):
        return "is global and the data are subsampled"
    if "coupled" in spec.extras and any(set(subsampled) & set(x.plates) for x in spec.latents):
        return "is coupled across"
    return None


# --- random specs -----------------------------------------------------------------------------------------


def random_spec(seed):
    """By a generator of its own: Hypothesis would try many specs that hardly differ, and each costs a compilation."""
    rng = Random(seed)
    pick = lambda *options: rng.choice(options)
    rarely = lambda usual, *others: usual if rng.random() < 0.95 else rng.choice(others)

    def latent():
        plates = pick((), ("data",), ("data",), ("second",), ("data", "second"))
        energy = rarely(pick(None, None, "param", "param", "covariate"), "latent", "wrong shape")
        supports = PROPER if energy is not None else [*PROPER, "improper"]
        return Latent(plates, rarely(pick(*supports), "discrete", "improper"), energy, pick(0, 0, 2), pick(False, True))

    def param():
        kind = pick(*CONSTRAINTS)
        return kind, pick((2,), (3, 2)) if kind == "simplex" else pick((), (2,), (3, 2))

    latents = tuple(latent() for _ in range(pick(0, 1, 1, 2, 2, 3)))
    return Spec(
        latents,
        pick(*LIKELIHOODS) if latents else rarely("energy", "normal"),
        pick(0, 0, 2),
        tuple(param() for _ in range(pick(0, 1, 2))),
        pick(True, True, True, False),
        pick(None, None, "inside", "outside"),
        rarely(pick(None, None, None, 1, 2, 3, 4, 5), 6),
        rarely(pick(None, None, None, None, None, 1), 3),
        frozenset(extra for extra in EXTRAS if rng.random() < EXTRAS[extra]),
        pick("default", "default", *HOW),
    )


PROPER = ["normal", "positive", "unit", "interval", "simplex"]
EXTRAS = {"factor": 0.3, "mask": 0.3, "scale": 0.3, "deterministic": 0.3}
EXTRAS |= {"mask latents": 0.15, "scale latents": 0.15, "coupled": 0.15}
SPECS = st.integers(0, 2**32 - 1).map(random_spec)


# --- the property -----------------------------------------------------------------------------------------


def check_refused(error, wanted):
    """One of the errors that we document, from our own code, not from inside JAX or NumPyro."""
    where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    assert isinstance(error, ValueError | TypeError) and where.is_relative_to(PACKAGE)
    assert wanted is not None, "a model that can be fitted was refused"
    assert re.search(wanted, str(error)), f"another message was wanted: {wanted}"


def equal(a, b):
    data = lambda x: random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(data(x), data(y), equal_nan=True), a, b)))


def check(spec):
    model, args, kwargs = build(spec)
    fitter = EBIPLA(model, num_particles=N, num_steps=STEPS, num_samples=S, thinning=1, warmup=2, **HOW[spec.how])
    run = lambda **options: fitter.run(random.key(0), *args, progress_bar=False, **kwargs, **options)
    wanted = fault(spec)
    try:
        fit = run()
    except (ValueError, TypeError) as error:
        check_refused(error, wanted)
        return
    assert wanted is None, "a model that cannot be fitted was not refused"
    assert fit.stopped is None and fit.losses.shape == (STEPS,)
    samples = fit.get_samples()
    for name, value in [*fit.params.items(), *fit.history.items(), *samples.items()]:
        assert np.isfinite(value).all(), name
    assert {k: v.shape for k, v in samples.items() if k != "eta"} == {
        f"x{i}": (N, S, *shape_of(spec, latent)) for i, latent in enumerate(spec.latents)
    }
    again = run(num_steps=STEPS - HALF, init_state=run(num_steps=HALF).state)
    assert equal(fit.state, again.state) and equal(samples, again.get_samples())


@pytest.fixture(scope="module", autouse=True)
def _whole_tracebacks():
    """Else JAX hides that an error was raised inside it."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


# Without shrinking: a spec is small as it is.
FUZZ = {"derandomize": True, "deadline": None, "database": None, "phases": (Phase.generate,)}


@settings(max_examples=4, **FUZZ)
@given(SPECS)
def test_a_random_model(spec):
    check(spec)


@pytest.mark.slow
@settings(max_examples=200, **FUZZ)
@given(SPECS)
def test_many_random_models(spec):
    check(spec)
    if hash(spec) % 10 == 0:
        jax.clear_caches()
