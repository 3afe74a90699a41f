"""Settings of the pages: ``python -m sphinx -W docs out/docs``."""

import deformable

project = "deformable"
version = release = deformable.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px", "sidebar_width": "240px"}
html_show_copyright = False
autodoc_typehints = "none"  # the docstrings say more
autosummary_generate = True
numpydoc_show_class_members = False
