"""The machine code of a case for a GPU that is not here, and what it holds."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.aot.case import Case


@dataclass(frozen=True, kw_only=True)
class Target:
    """A GPU to compile for; ``shared`` is bytes of shared memory a block may have."""

    backend: str
    arch: int | str
    warp: int
    shared: int
    matrix: str
    registers: int = 255


TARGETS = {
    "sm_80": Target(backend="cuda", arch=80, warp=32, shared=163 << 10, matrix="HMMA"),
    "sm_90": Target(backend="cuda", arch=90, warp=32, shared=227 << 10, matrix="HGMMA"),
    "sm_100": Target(backend="cuda", arch=100, warp=32, shared=227 << 10, matrix="UTCHMMA"),
    "gfx942": Target(backend="hip", arch="gfx942", warp=64, shared=64 << 10, matrix="MFMA"),
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """The needs of one compiled kernel; ``matrix`` and ``copies`` count instructions."""

    case: str
    registers: int
    shared: int
    stack: int
    spills: int
    matrix: int
    copies: int
    instructions: int


def compile_case(case: Case, target: Target) -> Report:
    """Compile one case and count what its machine code does."""
    import triton
    from triton.backends.compiler import GPUTarget

    hip = target.backend == "hip"
    order = {name: i for i, name in enumerate(case.kernel.arg_names)}
    source = triton.compiler.ASTSource(
        fn=case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in order},
        constexprs=dict(case.constexprs),
        attrs={(order[name],): [["tt.divisibility", 16]] for name in case.divisible},
    )
    stages = min(case.num_stages, 2) if hip else case.num_stages
    compiled = triton.compile(
        source,
        target=GPUTarget(target.backend, target.arch, target.warp),
        options={"num_warps": case.num_warps, "num_stages": stages},
    )
    read = _read_amd if hip else _read_nvidia
    return Report(case=case.name, shared=compiled.metadata.shared, **read(compiled.asm))


def _read_nvidia(asm: Mapping[str, Any]) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise SystemExit(f"cuobjdump -res-usage: expected REG and STACK, got {usage!r}")
    words = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", code)
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": sum(word in ("STL", "LDL") for word in words),
        "matrix": sum(word in ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA") for word in words),
        "copies": sum(word in ("LDGSTS", "UTMALDG", "UBLKCP") for word in words),
        "instructions": len(words),
    }


def _read_amd(asm: Mapping[str, Any]) -> dict[str, int]:
    code = asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        return int(found[1]) if found else 0

    words = re.findall(r"^\s+([a-z]+_\w+)", code, re.MULTILINE)
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count"),
        "matrix": sum(word.startswith("v_mfma") for word in words),
        "copies": sum("_load_" in word for word in words),
        "instructions": len(words),
    }


def _tool(name: str, *arguments: str) -> str:
    import triton.backends.nvidia as nvidia

    path = Path(nvidia.__file__).parent / "bin" / name
    done = subprocess.run((str(path), *arguments), capture_output=True, text=True, check=True)
    return done.stdout
