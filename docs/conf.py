"""Configuration of the documentation: `sphinx-build -W -n docs build/site`."""

import pathlib
import sys

import jfog

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

project = "jfog"
version = release = jfog.__version__
html_title = f"jfog {version}"
html_theme = "furo"
extensions = [
  "myst_nb",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx_copybutton",
  "jfog_docs",
]
# The code blocks of pages are executed by tests/test_docs.py.
nb_execution_mode = "off"
myst_heading_anchors = 3
# Docstrings are plain text: single backticks are code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_custom_sections = [("Source", "notes_style")]
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_use_ivar = True
copybutton_prompt_text = ">>> "
# Mermaid is drawn where the pages are read on GitHub.
suppress_warnings = ["misc.highlighting_failure"]
# Names of other projects, whose inventories a build without network lacks, and
# private bases of documented states.
nitpick_ignore_regex = [
  (r"py:.*", r"(jax|numpy|optax|collections|typing|abc)\..*"),
  (r"py:class", r"jfog\.(optimizers|runtime|primitives)(\.\w+)*\._.*"),
]
