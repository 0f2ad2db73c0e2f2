"""Configuration of the documentation: ``make docs`` builds it into docs/_build/html."""

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

from docutils import nodes

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
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Shape", "Reference", "Returns"]


def mark_long_lines(app, tree):
    """A class for blocks of text with lines that no page is wide enough for: sentences, or columns."""
    for block in tree.findall(nodes.literal_block):
        long = [line for line in block.astext().splitlines() if len(line) > 95]
        if block.get("language") == "text" and long:
            are_columns = any("  " in line for line in long)
            block["classes"].append("columns" if are_columns else "sentences")


def keep_punctuation(app, tree):
    """A full stop or a comma behind a formula becomes part of it, or it could begin the next line."""
    for formula in tree.findall(nodes.math):
        after = formula.next_node(descend=False, siblings=True)
        if isinstance(after, nodes.Text) and (mark := re.match(r"[.,:;)]+(?=\s|$)", after)):
            formula.children[0] = nodes.Text(rf"{formula.astext()}\text{{{mark.group()}}}")
            after.parent.replace(after, nodes.Text(after[mark.end() :]))


def keep_underscores(app, what, name, thing, options, lines):
    """In the text of Sphinx a name that ends with an underscore, such as ``result_``, is a link."""
    lines[:] = [re.sub(r"^(:(?:ivar|vartype) \w+)_:", r"\1\\_:", line) for line in lines]


def setup(app):
    from gallery import draw
    from model_pictures import draw_models
    from notebooks import write_notebooks
    from pictures import draw_plots

    def pictures(app):
        source = Path(app.srcdir)
        draw(source / "_generated")
        draw_plots(source / "_generated" / "plots")
        draw_models(source / "models.md", source / "_generated" / "models")
        write_notebooks(source, source / "_generated" / "notebooks")

    app.connect("builder-inited", pictures)
    app.connect("doctree-read", mark_long_lines)
    app.connect("doctree-read", keep_punctuation)
    app.connect("autodoc-process-docstring", keep_underscores, priority=900)


html_static_path = ["_static"]
html_css_files = ["custom.css"]
