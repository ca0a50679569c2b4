project = "patchad"
author = "the patchad authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "patchad"
exclude_patterns = ["_build"]
html_static_path = ["_static"]
html_css_files = ["wide.css"]
