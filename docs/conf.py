"""Settings of the docs site: `make docs` builds docs/_build/html. Nothing is fetched."""

project = "E-GRPO"
copyright = ""
html_show_copyright = False
html_show_sphinx = False
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
root_doc = "index"
myst_heading_anchors = 3  # as GitHub names them
html_theme = "furo"
html_title = "E-GRPO"
html_copy_source = False
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
highlight_language = "none"  # code says what it is; output and formulas are no Python
