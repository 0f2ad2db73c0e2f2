"""What the program says: errors in one line with an exit status, warnings, and text on the screen."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from openreml_nn.support.display import visible
from openreml_nn.support.errors import InputError, NumericalError
from openreml_nn.support.warning import warn

__all__ = [
    "Failed",
    "Stopped",
    "configured",
    "costs_nothing",
    "one_line",
    "reported",
    "shown",
    "stoppable",
]

#: What the disk or the user's rights can do to a run; all else is a fault of ours.
_DISK = {
    errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT,
    errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG,
}  # fmt: skip
#: Lightning's loggers of what only it can act on.
_TALKATIVE = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.signal_connector",
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal has stopped the program. No handler of errors takes it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def configured() -> None:
    """Say only what a user of mixed models can act on, each warning in one line."""
    # Lightning sets the level of its own loggers when it is imported: filtered, not silenced.
    for name in _TALKATIVE:
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.WARNING)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", category=RuntimeWarning)
    warnings.showwarning = _warn


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {one_line(message)}", file=sys.stderr)


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the block by :class:`Stopped`, so that no half file stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        for each in _SIGNALS:  # what ends is let end
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before = [signal.signal(each, stop) for each in _SIGNALS]
    try:
        yield
    finally:
        for each, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(each, handler)


class Failed(SystemExit):
    """The end of the program after an error, of which it has told.

    Args:
        status: its exit status.
        message: what it has said.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status)
        self.status, self.message = status, message


@contextmanager
def reported(advice: str = "") -> Iterator[None]:
    """End the program by its rule: status 0 when done, 2 and one line where the input is invalid,
    128 and the signal's number where one has stopped it. Any other exception is an error in the package.

    Args:
        advice: what to do where memory does not suffice.
    """
    status = 2
    try:
        try:
            yield
            return
        except Exception as error:
            # What cleans up after a stop, such as a logger that is closed twice, may fail in turn.
            if (stopped := _stop_behind(error)) is None:
                raise
            raise stopped from None
    except (InputError, NumericalError, HydraException, OmegaConfBaseException) as error:
        # What Hydra and OmegaConf add below the first lines is for their developers.
        message = re.split(r"\n\s*(?:full_key|Config search path)", str(error))[0]
        message = message or type(error).__name__
    except BrokenPipeError:
        # What reads the output, such as head, has read enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        message = f"cannot write {str(error.filename or 'the output')!r}: {error.strerror}"
    except Stopped as stop:
        message, status = str(stop), 128 + stop.number
    except Exception as error:
        if _is_of_memory(error):
            message = f"out of memory{advice and '; '}{advice} ({error})"
        elif _is_of_hydra(error):
            message = f"the options cannot be read: {str(error).partition(' : Override(')[0]}"
        else:
            raise
    message = one_line(message)
    print(f"error: {message}", file=sys.stderr)
    raise Failed(status, message)


@contextmanager
def costs_nothing(what: str) -> Iterator[None]:
    """Make a warning of one line of any error, so that what comes after a fit never costs it."""
    try:
        yield
    except Exception as error:
        reason = one_line(error)
        kind = type(error).__name__
        warn(f"{what} is left out: {f'{kind}: {reason}' if reason else kind}")


def one_line(message: object) -> str:
    """A message in one line, whatever names of users it holds."""
    return visible(" ".join(str(message).split()))


def shown(path: Path) -> str:
    """A path as seen from where the program was called."""
    here = Path.cwd()
    return visible(path.relative_to(here) if path.is_relative_to(here) else path)


def _stop_behind(error: BaseException | None) -> Stopped | None:
    """The stop during whose handling an error arose."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error


def _is_of_memory(error: Exception) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    # torch raises a plain RuntimeError where the allocator of the CPU fails.
    return bool({"MemoryError", "OutOfMemoryError"} & names) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def _is_of_hydra(error: Exception) -> bool:
    """Whether an error was raised where Hydra reads options, and so is about them."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return name.split(".")[0] in ("hydra", "omegaconf")
