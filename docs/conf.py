"""Sphinx configuration. Build with ``make docs``; what it makes lies in ``build/`` and ``docs/_generated/``."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The extension beside this file, and the package of this checkout, whatever is installed.
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]

project = "flowerbed"
author = "the flowerbed contributors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "reference"]
exclude_patterns = ["_build"]

# Notebooks are shown as they are stored; a test executes them.
nb_execution_mode = "off"
myst_heading_anchors = 3
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}

autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90

html_theme = "furo"
html_title = "flowerbed"
html_copy_source = False
html_show_sourcelink = False
