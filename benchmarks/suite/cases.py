"""All cases by name, made when they are asked for."""

from collections.abc import Callable
from functools import partial

from benchmarks.suite import energies, gaussian, mixed, quadrature
from benchmarks.suite.case import Case

#: The slow ones first, so that two workers end at about the same time.
_MAKERS: dict[str, Callable[[str], Case]] = {
    "swiss_roll": partial(energies.energy_case, family=energies.swiss_roll, seed=20),
    "eight_gaussians": partial(energies.energy_case, family=energies.eight_gaussians, seed=21),
    "pinwheel": partial(energies.energy_case, family=energies.pinwheel, seed=22),
    "two_moons": partial(energies.energy_case, family=energies.two_moons, seed=23),
    "checkerboard": partial(energies.energy_case, family=energies.checkerboard, seed=24),
    "conditional_energy": quadrature.conditional_case,
    "poisson_50000": partial(quadrature.poisson_case, num_data=50_000, batch_size=500),
    "quadratic_energy": gaussian.quadratic_case,
    "toy_hierarchy": partial(gaussian.toy_case, num_data=100),
    "toy_hierarchy_20": partial(gaussian.toy_case, num_data=20),
    "toy_hierarchy_x1e-2": partial(gaussian.toy_case, num_data=100, scale=1e-2),
    "toy_hierarchy_x1e2": partial(gaussian.toy_case, num_data=100, scale=1e2),
    "components": gaussian.components_case,
    "components_x1e-3": partial(gaussian.components_case, scale=1e-3),
    "components_x1e3": partial(gaussian.components_case, scale=1e3),
    "eight_schools": gaussian.schools_case,
    "pca": gaussian.pca_case,
    "factor_analysis": gaussian.factor_case,
    "poisson": partial(quadrature.poisson_case, num_data=200),
    "beta_binomial": quadrature.beta_case,
    "logistic_groups": quadrature.logistic_case,
    "mixed_intercepts": mixed.intercepts_case,
    "mixed_intercepts_far": partial(mixed.intercepts_case, far=300.0),
    "mixed_intercepts_x1e-3": partial(mixed.intercepts_case, scale=1e-3),
    "mixed_intercepts_x1e3": partial(mixed.intercepts_case, scale=1e3),
    "mixed_slopes": mixed.slopes_case,
    "mixed_crossed": mixed.crossed_case,
    "mixed_nested": mixed.nested_case,
    "mixed_variances": mixed.variances_case,
    "mixed_factor": mixed.factors_case,
    **{f"mixed_{family}": partial(mixed.answers_case, family=family) for family in mixed.FAMILIES},
    "mixed_growth": mixed.growth_case,
    "mixed_responses": mixed.responses_case,
}

NAMES = list(_MAKERS)


def make(name: str) -> Case:
    return _MAKERS[name](name)
