"""Sphinx configuration. The build needs no network: sphinx-build -W --keep-going -b html docs docs/_build/html.

``_ext/generated.py`` first writes the pages of options, recipes and costs from the code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from lightning_igpt import __version__

project = "lightning_igpt"
author = "The lightning_igpt developers"
copyright = f"2026, {author}"
release = version = __version__

extensions = ["generated", "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_ext", "_static"]
html_theme = "furo"
html_title = f"lightning_igpt {__version__}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
smartquotes = False  # would make one dash of the two of an option

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # Lightning's docstrings for its hooks are written for another project
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
