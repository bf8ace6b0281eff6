"""Sphinx configuration. The build needs no network, so intersphinx is off."""

from importlib.util import find_spec
from pathlib import Path

from sphinx.util import logging

import numpyro_ebipla

project = "numpyro_ebipla"
author = "The numpyro_ebipla contributors"
copyright = author
version = release = numpyro_ebipla.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "jupyter_execute", "gallery/*.ipynb", "gallery/*.py"]

# Examples are shown the shortest first.
sphinx_gallery_conf = {
    "examples_dirs": "../examples/gallery",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "abort_on_example_error": True,
    "parallel": 2,
    "min_reported_time": 0,
    "show_memory": False,
    "download_all_examples": False,
    "write_computation_times": False,
}

templates_path = ["_templates"]
html_theme = "furo"
html_title = f"numpyro_ebipla {release}"
# MathJax comes with the site. (As an extension the package would keep Sphinx from reading pages in two processes.)
mathjax_path = "mathjax/tex-chtml.js"
html_static_path = ["_static", str(Path(find_spec("sphinx-mathjax-offline").origin).parent / "static")]
html_css_files = ["wide.css"]

# Pages with `file_format: mystnb` run their {code-cell} blocks; an error fails the build.
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "auto"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_render_markdown_format = "myst"  # tables, in what a cell returns
nb_output_stderr = "remove"  # progress bars

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_inherit_docstrings = False  # NumPyro's docstrings refer to NumPyro's own pages
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # else `Attributes:` and the fields of a NamedTuple are described twice


def skip_undocumented_fields(app, what, name, obj, skip, options):
    """Leave out the fields of a NamedTuple that have only the docstring Python makes up."""
    if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number"):
        return True
    return None


def check_public_names(app, env):
    """Warn, which fails the build, if a name in ``numpyro_ebipla.__all__`` is not documented."""
    documented = {name.rpartition(".")[2] for name in env.domaindata["py"]["objects"]}
    for name in getattr(numpyro_ebipla, "__all__", []):
        if name not in documented and not name.startswith("__"):
            logging.getLogger(__name__).warning("public name is not in the docs: %s", name)


def setup(app):
    """Connect the two hooks above."""
    app.connect("autodoc-skip-member", skip_undocumented_fields)
    app.connect("env-check-consistency", check_public_names)
