"""The directory of a run: whose it is, what was there, and the options that are kept in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from openreml_nn.program.options import flattened, references
from openreml_nn.support.errors import InputError
from openreml_nn.support.files import is_temporary, write_text
from openreml_nn.support.warning import warn

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind
    fcntl = None  # type: ignore[assignment]

__all__ = ["RunDirectory", "without_environment"]

#: What a run may leave in its directory: ``result.json`` goes first.
_FILES = (
    "result.json",
    "failed.json",
    "summary.txt",
    "fixed.csv",
    "variance.csv",
    "blup.csv",
    "residuals.csv",
    "profile.csv",
    "heritability.csv",
    "predictions.csv",
    "trace.csv",
    "model.ckpt",
    "config.yaml",
    "plots",
    "logs",
    "checkpoints",
    ".hydra",
)


class RunDirectory:
    """The directory of one run: locked while the run lasts, and rid of what an earlier one left.

    Nothing is touched before :meth:`begin`, so that a run whose options are wrong leaves the
    directory as it was.

    Args:
        path: of the directory, which is made if there is none.
        writes: whether this process is the one that writes; the others of a run leave all
            as it is.

    Raises:
        InputError: when the block is entered while another run writes into the directory.
    """

    def __init__(self, path: str | Path, writes: bool = True) -> None:
        self.path = Path(path)
        self._writes = writes
        self._lock: int | None = None
        self._was_empty = False

    def __enter__(self) -> RunDirectory:
        if not self._writes:
            return self
        self.path.mkdir(parents=True, exist_ok=True)
        # A process that is killed holds its lock no longer, and a locked folder needs no file.
        self._lock = _locked(self.path)
        self._was_empty = not any(self.path.iterdir())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._was_empty and not any(self.path.glob("checkpoints/*")):
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)

    def begin(self, config: DictConfig, resumed: str | None = None) -> None:
        """Delete what an earlier run has left, and write the options of this one.

        Args:
            config: of the run. Values from the environment are written as the interpolations
                that they are.
            resumed: a checkpoint that stays.
        """
        if not self._writes:
            return
        for name in _FILES:
            self._remove(self.path / name, resumed)
        for left in self.path.glob(".*"):
            if is_temporary(left):
                left.unlink()
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(without_environment(config)))
        whole = HydraConfig.get()
        kept = {"config": config, "hydra": OmegaConf.create({"hydra": whole})}
        (self.path / ".hydra").mkdir(exist_ok=True)
        for name, part in {**kept, "overrides": whole.overrides.task}.items():
            write_text(self.path / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(part))

    def _remove(self, path: Path, resumed: str | None) -> None:
        kept = None if resumed is None else Path(resumed).resolve()
        if path.is_dir() and not path.is_symlink():
            for inner in path.iterdir():
                self._remove(inner, resumed)
            with suppress(OSError):  # what is resumed from stands in it
                path.rmdir()
        elif kept is None or path.resolve() != kept:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> int | None:
    """A lock on a directory, which ends with the process that holds it."""
    if fcntl is None:
        return None
    found = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(found)
        raise InputError(
            f"directory {str(path)!r} is in use by another run: expected a hydra.run.dir for each"
        ) from None
    except OSError as error:  # some network file systems
        os.close(found)
        warn(
            f"directory {str(path)!r} cannot be locked ({error.strerror}): start no other run in it"
        )
        return None
    return found


def without_environment(config: DictConfig) -> dict[str, Any]:
    """The values of a config, but for those from the environment, which stay interpolations:
    passwords live there."""
    written = flattened(config)

    def is_secret(key: str, seen: frozenset[str] = frozenset()) -> bool:
        texts = {k: str(v) for k, v in written.items() if k == key or k.startswith(f"{key}.")}
        return any("oc.env" in text for text in texts.values()) or any(
            is_secret(other, seen | {key})
            for inner, text in texts.items()
            for other in references(text, inner)
            if other not in seen
        )

    def resolved(raw: Any, parent: Any, name: str, key: str) -> Any:
        if isinstance(raw, Mapping):
            inner = parent[name]
            return {k: resolved(v, inner, k, f"{key}.{k}") for k, v in raw.items()}
        if OmegaConf.is_missing(parent, name) or is_secret(key):
            return raw
        value = parent[name]
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value

    raw: Any = OmegaConf.to_container(config, resolve=False)
    return {name: resolved(value, config, name, name) for name, value in raw.items()}
