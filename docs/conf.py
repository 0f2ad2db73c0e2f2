"""Configuration of the documentation: ``make docs`` builds it into docs/_build/html."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "openreml_nn"
copyright = "the openreml_nn authors"
release = importlib.metadata.version("openreml_nn")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = "openreml_nn"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_mock_imports = [] if importlib.util.find_spec("sklearn") else ["sklearn"]
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape", "Reference", "Returns"]


def setup(app):
    from gallery import draw
    from model_pictures import draw_models

    def pictures(app):
        source = Path(app.srcdir)
        draw(source / "_generated")
        draw_models(source / "models.md", source / "_generated" / "models")

    app.connect("builder-inited", pictures)


html_static_path = ["_static"]
html_css_files = ["custom.css"]
