"""Settings of the pages: ``python -m sphinx -W -n docs out/docs``."""

import deformable

project = "deformable"
version = release = deformable.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc"]
exclude_patterns = ["_build", "templates"]
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px", "sidebar_width": "240px"}
html_show_copyright = False
autodoc_typehints = "none"  # the docstrings say more
autosummary_generate = True
templates_path = ["templates"]
numpydoc_show_class_members = False


def setup(app):
    """Leave out the fields of named tuples: their section "Attributes" says what they are."""
    app.connect("autodoc-skip-member", lambda *event: _is_field(event[3]) or None)


def _is_field(member):
    return type(member).__name__ == "_tuplegetter"
