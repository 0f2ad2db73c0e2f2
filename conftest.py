"""Folders whose libraries are not installed are not looked into."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("sklearn") else ["openreml_nn/estimators"]
