"""Check an installed sensikernels from outside its sources: ``python -I installed.py TESTS``.

Every public name; one step (forward and backward) of every op on every backend this machine can
use, held against the reference; ``sensikernels doctor`` and ``bench``; a fine-tuning run of 64
rows whose model is read back. Ends with exit code 0, or with the first failure. The steps are
those of TESTS/ops/<op>/calls.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from pkgutil import iter_modules

import torch

import sensikernels
from sensikernels import ops
from sensikernels.cli import doctor


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


def run_ops(tests: Path) -> None:
    """Every op by every backend that serves it, held against the reference's result."""
    sys.path.insert(0, str(tests.parent))  # the package is imported: only tests is found there
    from tests.ops.calls import gather, public_functions

    steps = [step for calls in gather().values() for step in calls.steps]
    names = {step.name for step in steps}
    folders = {module.name for module in iter_modules(ops.__path__)} - {"common"}
    missed = sorted((folders | public_functions()) ^ names)
    assert not missed, f"a step of every op and of nothing else: {missed}"
    ran = 0
    for step in steps:
        for backend, device in usable():
            if not step.serves(backend, device):
                continue
            torch.manual_seed(0)
            got = step.run(backend, device)
            torch.manual_seed(0)
            want = step.run("reference", device)
            assert got, step.name
            for one, other in zip(got, want, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
            print(f"{step.name}: {backend} on {device} agrees with the reference", flush=True)
            ran += 1
    print(f"{ran} steps of {len(steps)} ops by {usable()}", flush=True)


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
    parser.add_argument("tests", type=Path, help="folder that holds ops/<op>/calls.py")
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
    tests = given.tests.resolve()
    run_ops(tests)
    if not given.ops:
        interpreted = command(__file__, str(tests), "--ops", TRITON_INTERPRET="1")
        print(interpreted.splitlines()[-2], flush=True)
        check_commands()
    print("installed package: all checks passed", flush=True)


if __name__ == "__main__":
    main()
