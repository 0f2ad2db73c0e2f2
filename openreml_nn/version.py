"""The version, which the wheel, pages and the package have from here."""

__version__ = "0.2.0"
