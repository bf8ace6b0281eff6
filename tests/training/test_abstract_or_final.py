"""Kernels, walkers and particles are abstract or final: what a concrete class does stands in that class."""

import inspect

import pytest

from numpyro_ebipla.kernels import AbstractKernel
from numpyro_ebipla.particles import AbstractParticles
from numpyro_ebipla.walkers import AbstractWalkers


def below(kind):
    """All subclasses, whatever their depth."""
    return [found for child in kind.__subclasses__() for found in (child, *below(child))]


KINDS = [AbstractKernel, AbstractWalkers, AbstractParticles]
CLASSES = sorted({found for kind in KINDS for found in below(kind)}, key=lambda c: c.__name__)
CONCRETE = [c for c in CLASSES if not inspect.isabstract(c)]


def methods(kind):
    """Names of the methods and properties that a class itself defines and that are not abstract."""
    own = {name for name, value in vars(kind).items() if inspect.isfunction(value) or isinstance(value, property)}
    return {name for name in own if not name.startswith("__")} - set(getattr(kind, "__abstractmethods__", ()))


def test_there_are_some_of_each():
    names = {c.__name__ for c in CONCRETE}
    assert names >= {"MALA", "ULA", "Underdamped", "Tempered", "Persistent", "Annealed", "ShortRun", "Contrastive"}
    assert names >= {"Particles", "ShortRunParticles", "SuccessiveParticles", "WeightedParticles"}


@pytest.mark.parametrize("kind", [*KINDS, *CLASSES], ids=lambda c: c.__name__)
def test_abstract_by_name_or_final(kind):
    assert inspect.isabstract(kind) == kind.__name__.startswith("Abstract")
    assert inspect.isabstract(kind) != getattr(kind, "__final__", False)


@pytest.mark.parametrize("kind", CONCRETE, ids=lambda c: c.__name__)
def test_no_method_is_written_twice(kind):
    """Neither here nor above: an abstract method has one implementation on the way down to a final class."""
    ancestors = [c for c in kind.__mro__ if c.__module__.startswith("numpyro_ebipla")]
    written = [name for c in ancestors for name in methods(c)]
    assert sorted(written) == sorted(set(written))
