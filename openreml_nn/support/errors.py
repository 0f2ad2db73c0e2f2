"""Errors that say whose fault it is: the input's, or that of the numbers."""

__all__ = ["InputError", "NotPositiveDefiniteError", "NumericalError"]


class InputError(ValueError):
    """The input is invalid; the message is one line that says where and what was expected."""


class NumericalError(ArithmeticError):
    """The numbers are at fault: a factorisation fails, or the dtype cannot give the digits.

    The message says which quantity it is and what to do.
    """


class NotPositiveDefiniteError(NumericalError, ValueError):
    """A matrix that must be positive definite is not, which its factorisation finds.

    The message says which. What is seen of an argument when it is given is an :class:`InputError`.
    """
