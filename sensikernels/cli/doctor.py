"""A report of what this machine can run, and why it cannot run the rest."""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib import metadata
from typing import Any

import torch

from sensikernels import __version__
from sensikernels._core import environment, extension

_LIBRARIES = (
    *("numpy", "triton", "transformers", "safetensors", "accelerate"),
    *("datasets", "scikit-learn", "scipy"),
)


def report() -> dict[str, Any]:
    """Versions, devices and backends, as plain values fit for JSON.

    ``backends`` maps each name to None if it is usable, else to the reason why it is not.
    ``families``: each family of encoders, and why it cannot be trimmed or take the fast step; None
    without transformers. ``build`` says which build this is; ``extension`` is what the compiled
    library was built from, None without one.
    """
    return {
        "sensikernels": __version__,
        "build": extension.describe(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {"torch": torch.__version__, **{n: _version(n) for n in _LIBRARIES}},
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        },
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "backends": backends(),
        "families": families(),
        "auto": environment.backend(),
        "extension": None if extension.why_not() else extension.build_info(),
    }


def backends() -> dict[str, str | None]:
    """Each backend's name, and why it cannot be used here (None: it can)."""
    return {
        "reference": None,
        "native (CPU)": extension.why_not(),
        "native (CUDA)": _native_cuda(),
        "triton": _triton(interpreted=False),
        "triton interpreter": _triton(interpreted=True),
    }


def families() -> dict[str, dict[str, str | None]] | None:
    """Each family of encoders: why it cannot be trimmed or take the fast step (None: it can).

    None without transformers.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    from sensikernels.hf.families import FAMILIES

    return {
        family.title: {
            "trim": None if family.compact is not None else "it cannot be compacted",
            "fast": None if family.packed is not None else family.padded_because,
        }
        for family in FAMILIES
    }


def show(facts: dict[str, Any]) -> None:
    """Print a report: which build this is, on one line, and tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"build: {escape(facts['build'])}", soft_wrap=True, highlight=False)
    machine = Table(title="sensikernels doctor", show_header=False, title_justify="left")
    for name, value in _lines(facts):
        machine.add_row(name, escape(value))
    console.print(machine)
    usable = Table("backend", "usable", "why not")
    for name, reason in facts["backends"].items():
        usable.add_row(name, "no" if reason else "[green]yes[/green]", escape(reason or ""))
    console.print(usable)
    if facts["families"] is not None:
        known = Table("encoders", "trim", "fast", "why not")
        for name, reasons in facts["families"].items():
            can = ("no" if reason else "[green]yes[/green]" for reason in reasons.values())
            known.add_row(name, *can, escape("; ".join(filter(None, reasons.values()))))
        console.print(known)


def main() -> None:
    """Look and print."""
    show(report())


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    libraries = facts["libraries"].items()
    cpu = facts["cpu"]
    return [
        ("version", f"{facts['sensikernels']}, Python {facts['python']}, {facts['platform']}"),
        ("libraries", ", ".join(f"{n} {v}" for n, v in libraries if v)),
        ("not installed", ", ".join(n for n, v in libraries if v is None) or "-"),
        ("CPU", f"{cpu['capability']}, {cpu['threads']} threads"),
        ("float32 matmul", cpu["float32_matmul_precision"]),
        *((f"GPU {i}", _gpu_line(gpu)) for i, gpu in enumerate(facts["gpus"])),
        ("backend=auto", facts["auto"]),
    ]


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(index)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "multiprocessors": facts.multi_processor_count,
    }


def _gpu_line(gpu: dict[str, Any]) -> str:
    return f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['memory_gib']} GiB"


def _no_gpu() -> str | None:
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda or torch.version.hip
    return "no CUDA device" if built else f"torch {torch.__version__} is built without CUDA"


def _native_cuda() -> str | None:
    reason = extension.why_not() or _no_gpu()
    return reason or extension.why_no_cuda()


def _triton(*, interpreted: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed (Linux only, this is {sys.platform})"
    if environment.interpreting() != interpreted:
        return "TRITON_INTERPRET=1 is set" if not interpreted else "TRITON_INTERPRET=1 is not set"
    if not interpreted:
        return _no_gpu()
    if _version("triton") == "3.6.0" and _release(_version("numpy")) >= (2, 4):
        return "triton 3.6 cannot interpret loops beside numpy 2.4 or newer"
    return None


def _release(version: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (version or "0").split(".")[:2])
