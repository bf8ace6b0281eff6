"""What a fit says to cite: the source of every recipe, as the docs list it."""

from pathlib import Path

import jax.numpy as jnp
import pytest
from jax import random

from numpyro_ebipla.kernels.mala import MALA
from numpyro_ebipla.particles.persistent import Particles
from numpyro_ebipla.recipes import _RECIPES
from numpyro_ebipla.results.citation import SOURCES, sources_of
from numpyro_ebipla.walkers.tempered import Tempered
from tests.models import fitter, one_level

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", _RECIPES)
def test_a_recipe_cites_its_source(name):
    recipe, source, _ = _RECIPES[name]
    system = recipe(lambda: None)
    sources = sources_of(system.posterior, () if system.prior is None else (system.prior,))
    author, year = source.split(" ")[0].rstrip(","), source[-4:]
    assert any(source == s.where or (author in s.authors and year == str(s.year)) for s in sources.values())


def test_the_default_cites_its_parts():
    assert list(sources_of(Particles(MALA()), [Tempered()])) == ["marks2025", "syed2022", "titsias2023"]
    assert list(sources_of(Particles(MALA()), [])) == ["akyildiz2023", "kuntz2022", "titsias2023"]
    assert list(sources_of(None, [Tempered()])) == ["syed2022"]


def test_what_a_user_wrote_cites_nothing():
    class Own(Tempered):
        """Another strategy, whose source only its author knows."""

    assert sources_of(None, [Own()]) == {}


@pytest.mark.parametrize("name", SOURCES)
def test_sources_are_in_the_references(name):
    references = (ROOT / "docs/algorithm.md").read_text().partition("## References")[2].lower()
    assert SOURCES[name].title.lower() in references


@pytest.mark.parametrize("name", SOURCES)
def test_entries_are_bibtex(name):
    entry = SOURCES[name].bibtex(name)
    assert entry.count("{") == entry.count("}")
    assert entry.startswith("@") and entry.splitlines()[0].endswith(f"{{{name},")
    kinds = {"@misc": "eprint = ", "@inproceedings": "booktitle = ", "@article": "journal = "}
    assert kinds[entry.partition("{")[0]] in entry


def test_a_fit_cites_the_software_first():
    fit = fitter(one_level).run(random.key(0), jnp.arange(4.0), num_steps=2, num_samples=2, progress_bar=False)
    entries = fit.citation().split("\n\n")
    names = [entry.partition("{")[2].partition(",")[0] for entry in entries]
    assert names == ["numpyro_ebipla", "akyildiz2023", "kuntz2022", "titsias2023"]
