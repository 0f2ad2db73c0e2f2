"""Plausible faults, and the narrowest tests that should notice them.

Each replaces a text of a file, which must stand there exactly once. ``python -m tests.faults``
plants one at a time in a copy of the tree and says which no test notices.
"""
