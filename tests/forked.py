"""Programs in forks of this process, which has imported what takes a fresh one seconds."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed

import openreml_nn.lightning  # what the program imports when it is called
import openreml_nn.report  # noqa: F401
from openreml_nn.program.main import main

#: What a program says that is the first to need the compiled functions.
COMPILES = "openreml_nn compiles its sparse solver, once on this machine: a few seconds\n"

CONTEXT = multiprocessing.get_context("fork")

#: A command that has its arguments run where it stands by :func:`served`.
CLIENT = """
import json, os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
socket.send_fds(s, [json.dumps([os.getcwd(), sys.argv[2:]]).encode()], [1, 2])
sys.exit(int(s.recv(8)))
"""


def started(function: Callable[[], object], cwd: Path, streams: list[int]) -> BaseProcess:
    """A fork that calls a function in a folder; descriptors are its output and errors."""
    process = CONTEXT.Process(target=_run, args=(function, cwd, streams))
    process.start()
    return process


def forked(function: Callable[[], object], cwd: Path, timeout: float = 300) -> SimpleNamespace:
    """Call a function in a fork, in a folder; its status and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("stdout", "stderr")]
        streams = [os.open(path, os.O_WRONLY | os.O_CREAT) for path in paths]
        process = started(function, cwd, streams)
        process.join(timeout)
        late = process.is_alive()
        if late:
            process.kill()
        for stream in streams:
            os.close(stream)
        stdout, stderr = (path.read_text(encoding="utf-8") for path in paths)
        stderr = stderr.replace(COMPILES, "")  # which depends on what ran on the machine before
        assert not late, f"it runs for more than {timeout} seconds: {stderr}"
    return SimpleNamespace(returncode=process.exitcode, stdout=stdout, stderr=stderr)


def program(*arguments: str, cwd: Path) -> SimpleNamespace:
    """The console program, called in a fork in a folder."""
    return forked(lambda: main(arguments), cwd)


def _run(function: Callable[[], object], cwd: Path, streams: list[int]) -> None:
    for name, number, stream in zip(("stdout", "stderr"), (1, 2), streams, strict=True):
        os.dup2(stream, number)
        setattr(sys, name, os.fdopen(number, "w", encoding="utf-8"))
    os.chdir(cwd)
    # As a new process has it.
    sys.argv = ["openreml-nn"]
    torch.set_default_dtype(torch.float32)
    warnings.resetwarnings()
    function()


def ranks(function: Callable[[], object], size: int, folder: Path) -> list[Any]:
    """What a function returns in each of some forks that know of one another."""
    torch.multiprocessing.start_processes(
        _rank, (function, size, folder), nprocs=size, start_method="fork"
    )
    return [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)]


def _rank(rank: int, function: Callable[[], object], size: int, folder: Path) -> None:
    store = f"file://{folder / f'store{size}'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    try:
        torch.save(function(), folder / f"{size}-{rank}.pt")
    finally:
        distributed.destroy_process_group()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The words of a shell that call the program, for as long as the block runs."""
    path, client = folder / "socket", folder / "client.py"
    client.write_text(CLIENT)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = CONTEXT.Process(target=_serve, args=(listener,))
        server.start()
        try:
            yield f"'{sys.executable}' -IS '{client}' '{path}'"
        finally:
            server.kill()
            server.join()


def _serve(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        message, streams, _, _ = socket.recv_fds(connection, 65536, 2)
        cwd, arguments = json.loads(message)
        process = CONTEXT.Process(target=_run, args=(lambda: main(arguments), cwd, streams))  # noqa: B023
        process.start()
        process.join()
        for stream in streams:
            os.close(stream)
        connection.sendall(str(process.exitcode).encode())
        connection.close()
