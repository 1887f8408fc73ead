"""Sphinx configuration. The build needs no network: sphinx-build -W --keep-going -b html docs docs/_build/html."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_igpt import __version__

project = "lightning_igpt"
author = "The lightning_igpt developers"
copyright = f"2026, {author}"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "reference/_generated"]
html_theme = "furo"
html_title = f"lightning_igpt {__version__}"

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # Lightning's docstrings for its hooks are written for another project
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
