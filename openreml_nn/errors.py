"""The error that means: the input is at fault."""

__all__ = ["InputError"]


class InputError(ValueError):
    """The input is at fault; the message is one line that says where and what was expected."""
