"""Sphinx's settings for `make site`; dkto.workshop.site lays out what it reads."""

from docutils import nodes

from dkto import __version__
from dkto.workshop.site import ROOT, literal_formulas, mathml

project = "dkto"
author = "the dkto authors"
release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"dkto {__version__}"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["site.css"]

nb_execution_mode = "off"  # the lessons are shown as they ran
nb_ipywidgets_js = {}  # no script from elsewhere
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
# a lesson's live widget is shown by its picture; a word such as `low` is the name of several attributes
suppress_warnings = ["mystnb.unknown_mime_type", "ref.python", "myst.header"]  # the glossary skips a level

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True  # as the code has them: the value of a path would name a folder of this machine
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def setup(app):
    """Formulas become MathML; docstrings are read as they are written here."""

    def show(display):
        def visit(self, node):
            self.body.append(mathml(node.astext(), display))
            raise nodes.SkipNode

        return visit

    app.add_html_math_renderer("mathml", (show(False), None), (show(True), None))
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-signature", here)


def process(app, what, name, thing, options, lines):
    """Prepare a docstring for napoleon and reStructuredText."""
    lines[:] = literal_formulas(lines)


def here(app, what, name, thing, options, signature, returns):
    """A default that is a file of the project is shown without the place of this checkout."""
    return (signature or "").replace(f"{ROOT}/", "") or None, returns


def skip(app, what, name, thing, skipped, options):
    """Fields of a named tuple, whose docstring only counts them, are described where their class is."""
    return True if type(thing).__name__ == "_tuplegetter" else None
