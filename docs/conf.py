"""Sphinx: the Markdown pages as they lie in the repository, and an API reference of every public module."""

import importlib.metadata
import pydoc
import re

project = "MedTL"
project_copyright = "MedTL contributors, Apache-2.0"
release = importlib.metadata.version("medtl")
extensions = ["myst_parser", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px", "sidebar_width": "280px"}
html_static_path = html_css_files = ["site.css"]

# The source folder is the repository, so that links between pages work here as they do on a code host.
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/**.md",
    "docs/**.rst",
    "bundles/*/docs/README.md",
    "tutorials/README.md",
    "benchmarks/real/README.md",
]
exclude_patterns = ["docs/build/html", "docs/build/api/modules.rst"]
myst_heading_anchors = 3

apidoc_modules = [{"path": "../medtl_ext", "destination": "docs/build/api"}]
apidoc_separate_modules = True
apidoc_module_first = True
apidoc_automodule_options = {"members", "show-inheritance"}
autodoc_default_options = {"ignore-module-all": True, "member-order": "bysource"}
napoleon_use_ivar = True  # else the fields of a dataclass appear twice
suppress_warnings = ["ref.python"]  # a word such as `labels` names a field of several classes
default_role = "py:obj"  # `name` in a docstring: a link where there is such an object, and code where there is none


def escape_axes(app, what, name, obj, options, lines):
    """The docstrings write N x *spatial, where reStructuredText sees the start of emphasis."""
    lines[:] = [re.sub(r"(?<![`\\])\*(?=(spatial|cells|grid)\b)", r"\\*", line) for line in lines]


def short_types(app, what, name, obj, options, signature, returns):
    """NumPy's ArrayLike is printed as the union that it is."""
    short = [
        text and re.sub(r"[~.\w]*_Buffer \| .*?\[complex \| bytes \| str\]", "ArrayLike", text)
        for text in (signature, returns)
    ]
    return tuple(short)


def where_defined(app, env, node, contnode):
    """Link `medtl_ext.metrics.LEEP`, as it is imported, to where it is documented: in `medtl_ext.metrics.leep`."""
    found = pydoc.locate(node.get("reftarget", ""))
    if not hasattr(found, "__qualname__") or not hasattr(found, "__module__"):
        return None
    name = f"{found.__module__}.{found.__qualname__}"
    return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, contnode)


def setup(app):
    app.connect("autodoc-process-docstring", escape_axes)
    app.connect("autodoc-process-signature", short_types)
    app.connect("missing-reference", where_defined)
