"""A run by several processes on this machine, as torchrun would start them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

from sensikernels.training import Settings
from tests.training.children import _child, _server


def run_together(
    settings: Settings,
    size: int = 2,
    kill: tuple[str, int] | None = None,
    victim: int = 0,
    prepare: Callable[[int], object] | None = None,
) -> list[int]:
    """Exit codes by rank; rank ``victim`` dies by SIGKILL where ``kill`` says.

    Each process calls ``prepare(rank)`` first.
    """
    port = free_port()
    processes = [
        _server.Process(
            target=_member,
            args=(settings, rank, size, port, kill if rank == victim else None, prepare),
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    return [int(process.exitcode) for process in processes]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def place(rank: int, size: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _member(settings: Settings, rank: int, size: int, port: int, kill: Any, prepare: Any) -> None:
    os.environ |= place(rank, size, port)
    if prepare is not None:
        prepare(rank)
    _child(settings, kill)
