"""Check an installed sensikernels from outside its sources: ``python -I .ci/installed.py``.

Every public name; one step (forward and backward) of every op on every backend this machine can
use, held against the reference; ``sensikernels doctor`` and ``bench``; a fine-tuning run of 64
rows whose model is read back. Ends with exit code 0, or with the first failure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sensikernels
from sensikernels import Mask, MaskedLinear, SelectiveLinear, SubsetAdamW
from sensikernels.cli import doctor

Case = Callable[[str, str], list[Tensor]]
"""``(backend, device)`` to what the op gives: outputs, then gradients."""
ROWS, IN, OUT = 48, 64, 96


def leaf(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, device=device).requires_grad_()


def stepped(out: Tensor, *leaves: Tensor | None) -> list[Tensor]:
    """The output, and the gradients of a weighted sum of it."""
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    (out * weights).sum().backward()
    return [out.detach(), *(x.grad for x in leaves if x is not None and x.grad is not None)]


def bias_gelu(backend: str, device: str) -> list[Tensor]:
    x, bias = leaf(ROWS, IN, device=device), leaf(IN, device=device)
    return stepped(sensikernels.bias_gelu(x, bias, backend=backend), x, bias)


def cross_entropy(backend: str, device: str) -> list[Tensor]:
    logits = leaf(ROWS, 31, device=device)
    labels = (torch.arange(ROWS) % 31).to(device)
    return stepped(sensikernels.cross_entropy(logits, labels, backend=backend), logits)


def dropout(backend: str, device: str) -> list[Tensor]:
    x, seed = leaf(ROWS, IN, device=device), torch.tensor(5, device=device)
    return stepped(sensikernels.dropout(x, 0.3, seed=seed, backend=backend), x)


def dropout_add_norm(backend: str, device: str) -> list[Tensor]:
    x, residual = (leaf(ROWS, IN, device=device) for _ in range(2))
    weight, bias = (leaf(IN, device=device) for _ in range(2))
    seed = torch.tensor(5, device=device)
    given: dict[str, Any] = {"dropout": 0.2, "seed": seed, "backend": backend}
    out = sensikernels.dropout_add_norm(x, residual, weight, bias, **given)
    return stepped(out, x, residual, weight, bias)


def embed_norm(backend: str, device: str) -> list[Tensor]:
    place = torch.arange(ROWS, device=device)
    word, position, kind = (leaf(n, IN, device=device) for n in (30, ROWS, 2))
    weight, bias = (leaf(IN, device=device) for _ in range(2))
    tables = (word, position, kind, weight, bias)
    out = sensikernels.embed_norm(place * 7 % 30, place, place % 2, *tables, backend=backend)
    return stepped(out, *tables)


def varlen_attention(backend: str, device: str) -> list[Tensor]:
    q, k, v = (leaf(ROWS, 2, 32, device=device) for _ in range(3))
    ends = torch.tensor([0, 5, 21, ROWS], dtype=torch.int32, device=device)
    out = sensikernels.varlen_attention(q, k, v, ends, max_length=27, backend=backend)
    return stepped(out, q, k, v)


def masks() -> list[Mask]:
    grid = torch.arange(6).view(3, 2) % 3 != 1
    rows = Mask.rows(torch.arange(OUT) % 3 == 0, (OUT, IN))
    return [rows, Mask.blocks(grid, (32, 32), (OUT, IN))]


def linears(kind: Any, backend: str, device: str) -> list[Tensor]:
    """A layer of ``kind`` and so its op, by rows and by blocks."""
    found = []
    for mask in masks():
        x, dense = leaf(ROWS, IN, device=device), nn.Linear(IN, OUT).to(device)
        layer = kind.from_linear(dense, mask, backend=backend)
        found += stepped(layer(x), x, *layer.parameters())
    return found


def masked_linear(backend: str, device: str) -> list[Tensor]:
    return linears(MaskedLinear, backend, device)


def selective_linear(backend: str, device: str) -> list[Tensor]:
    return linears(SelectiveLinear, backend, device)


def group_reduce(backend: str, device: str) -> list[Tensor]:
    weights, grads = ([torch.randn(s, device=device) for s in ((67, 130), (129,))] for _ in "wg")
    names = ("sum_abs_wg", "sum_batch_grad_squared", "max_abs_grad")
    sums = sensikernels.group_reduce(weights, grads, names, groups="row", backend=backend)
    return [sums.flat(name) for name in names]


def select_kept(backend: str, device: str) -> list[Tensor]:
    scores = torch.randn(201, device=device).mul(4).round()
    return [sensikernels.select_kept(scores, k=77, backend=backend).bits]


def select_chain(backend: str, device: str) -> list[Tensor]:
    importance, own, passed = (torch.rand(24, device=device).mul(8).ceil() for _ in range(3))
    return [sensikernels.select_chain(importance, own, passed, 60.0, backend=backend)]


def subset_adamw(backend: str, device: str) -> list[Tensor]:
    param = nn.Parameter(torch.randn(OUT, IN, device=device))
    optimizer = SubsetAdamW([param], lr=1e-2, backend=backend, max_grad_norm=1.0)
    optimizer.set_kept(param, ("rows", torch.tensor([0, 5, 90], dtype=torch.int32, device=device)))
    for _ in range(2):
        param.grad = torch.randn(OUT, IN, device=device)
        optimizer.step()
    return [param.detach()]


BOTH = ("native", "triton")
CASES: dict[str, tuple[Case, tuple[str, ...]]] = {
    "bias_gelu": (bias_gelu, BOTH),
    "cross_entropy": (cross_entropy, BOTH),
    "dropout": (dropout, BOTH),
    "dropout_add_norm": (dropout_add_norm, BOTH),
    "embed_norm": (embed_norm, BOTH),
    "group_reduce": (group_reduce, BOTH),
    "masked_linear": (masked_linear, BOTH),
    "select_chain": (select_chain, ("native",)),
    "select_kept": (select_kept, ("native",)),
    "selective_linear": (selective_linear, BOTH),
    "subset_adamw": (subset_adamw, ("native",)),
    "varlen_attention": (varlen_attention, ("native",)),
}


def usable() -> list[tuple[str, str]]:
    """``(backend, device)`` of all that ``doctor`` calls usable, the reference included."""
    names = {
        "reference": ("reference", "cpu"),
        "native (CPU)": ("native", "cpu"),
        "native (CUDA)": ("native", "cuda"),
        "triton": ("triton", "cuda"),
        "triton interpreter": ("triton", "cpu"),
    }
    return [names[name] for name, reason in doctor.backends().items() if reason is None]


def on_cuda(name: str, backend: str) -> bool:
    """Compiled CUDA kernels exist for these alone; the other ops are Triton's there."""
    return backend != "native" or name in ("group_reduce", "subset_adamw")


def run_ops() -> None:
    """Every op by every backend that serves it, held against the reference's result."""
    ran = 0
    for name, (case, backends) in CASES.items():
        for backend, device in usable():
            serves = backend in ("reference", *backends)
            if not serves or (device == "cuda" and not on_cuda(name, backend)):
                continue
            torch.manual_seed(0)
            got = case(backend, device)
            torch.manual_seed(0)
            want = case("reference", device)
            assert got, name
            for one, other in zip(got, want, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
            print(f"{name}: {backend} on {device} agrees with the reference", flush=True)
            ran += 1
    print(f"{ran} steps of {len(CASES)} ops by {usable()}", flush=True)


def command(*words: str, expect: int = 0, **environment: str) -> str:
    """Run this Python outside every source tree; what it prints."""
    full = [sys.executable, "-I", *words]
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            full, cwd=elsewhere, env={**os.environ, **environment}, capture_output=True, text=True
        )
    said = done.stdout + done.stderr
    assert done.returncode == expect, f"{full}: exit {done.returncode}\n{said}"
    print(f"{' '.join(words[:5])}: exit {expect}", flush=True)
    return said


def cli(*words: str) -> str:
    return command("-m", "sensikernels.cli", *words)


def read_back(folder: Path) -> None:
    """A saved model classifies, and has the size that the report says it has."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[101, 2023, 2143, 102]])).logits
    assert logits.shape == (1, 2)
    assert logits.isfinite().all()
    report = json.loads((folder / "report.json").read_text())
    held = sum(p.numel() for p in model.parameters())
    assert held == report["saved_model"]["parameters"], (held, report["saved_model"])
    print(f"read back: {held:,} parameters", flush=True)


def check_commands() -> None:
    """The doctor's line, two benchmarks and a fine-tuning run."""
    first = cli("doctor").splitlines()[0]
    assert first.startswith("build: "), first
    print(first, flush=True)
    cli("bench", "reductions", "--quick")
    cli("bench", "linear", "--quick", "--seconds", "30")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        small = ("--max-train-samples", "64", "--batch-size", "16", "--ranking-rows", "32")
        run = ("--task", "demo", "--model", "minilm", "--flops", "0.5", *small)
        cli("finetune", *run, "--output", str(output))
        read_back(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--native", action="store_true", help="fail without compiled kernels")
    parser.add_argument("--ops", action="store_true", help="only the names and the ops")
    given = parser.parse_args()
    home = Path(sensikernels.__file__).resolve().parent
    assert home.parent == Path(sysconfig.get_path("purelib")).resolve(), f"not installed: {home}"
    print(f"sensikernels {sensikernels.__version__} in {home}", flush=True)
    for name in sensikernels.__all__:
        assert getattr(sensikernels, name) is not None, name
    if given.native:
        reason = doctor.backends()["native (CPU)"]
        assert reason is None, reason
    run_ops()
    if not given.ops:
        interpreted = command(__file__, "--ops", TRITON_INTERPRET="1")
        print(interpreted.splitlines()[-2], flush=True)
        check_commands()
    print("installed package: all checks passed", flush=True)


if __name__ == "__main__":
    main()
