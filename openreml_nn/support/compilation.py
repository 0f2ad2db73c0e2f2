"""Functions over arrays that are compiled when they are first called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cached_property, update_wrapper
from time import perf_counter
from typing import Any

__all__ = ["Compiled", "announcer", "compiled", "inlined"]


class Compiled:
    """A function that numba knows once it is used: importing numba takes as long as many a fit.

    Args:
        function: the function, in the part of Python that numba compiles.
        make: makes of it what numba calls.
    """

    def __init__(
        self, function: Callable[..., Any], make: Callable[[Callable[..., Any]], Any]
    ) -> None:
        update_wrapper(self, function)
        self._function, self._make = function, make

    @cached_property
    def made(self) -> Any:
        """What numba calls, which may call others of this kind."""
        from numba.core.registry import cpu_target
        from numba.extending import typeof_impl

        def type_of(value: Compiled, _: object) -> Any:
            made = value.made
            cpu_target.typing_context.refresh()
            return cpu_target.typing_context.resolve_value_type(made)

        if Compiled not in typeof_impl.registry:
            typeof_impl.register(Compiled)(type_of)
            from numba.core import event

            event.register("numba:compile", announcer())
        return self._make(self._function)

    def __call__(self, *args: Any) -> Any:
        return self.made(*args)


def compiled(function: Callable[..., Any]) -> Compiled:
    """The function, compiled by numba; what is compiled is kept on disk for the next process.

    Where no folder can be written to it is compiled in each process anew.
    """
    return Compiled(function, _njit)


def inlined(function: Callable[..., Any]) -> Compiled:
    """A function of numba's context and the types of arguments, which yields their signature and what
    builds the call's code: for what compiled functions call."""
    return Compiled(function, _intrinsic)


def announcer(after: float = 1.0) -> Any:
    """What says on stderr, once, that functions of this package are being compiled.

    Args:
        after: so many seconds after the first of them was begun.
    """
    from numba.core.event import Event, Listener

    class Announcer(Listener):  # type: ignore[misc]
        begun: float | None = None
        said = False

        def on_start(self, event: Event) -> None:
            name = event.data["dispatcher"].py_func.__module__
            if self.said or name.partition(".")[0] != __name__.partition(".")[0]:
                return
            self.begun = perf_counter() if self.begun is None else self.begun
            if perf_counter() - self.begun >= after:
                self.said = True
                text = "openreml_nn compiles its sparse solver, once on this machine: a few seconds"
                print(text, file=sys.stderr, flush=True)

        def on_end(self, event: Event) -> None:
            pass

    return Announcer()


def _njit(function: Callable[..., Any]) -> Any:
    from numba import njit

    # As NumPy divides: to raise where a divisor is zero takes more code, and longer to compile.
    try:
        return njit(cache=True, error_model="numpy")(function)
    except RuntimeError:  # there is no place to keep it
        return njit(error_model="numpy")(function)


def _intrinsic(function: Callable[..., Any]) -> Any:
    from numba.extending import intrinsic

    return intrinsic(function)
