"""What each part of the step adds on short real batches: ``python -m sensikernels.bench.ablation``.

MiniLM, 32 sentences a batch, the same ranked plan at half the FLOPs. Every stage runs in a process
of its own (oneDNN reads its cache size once), interleaved there with stock HuggingFace dense
training on the same batches. Stages add up, each with what came before:

1. ``trim``: linears cut by hand, everything else HuggingFace's, sentences in random order
2. ``lengths``: sentences of like length together, padded to multiples of 8
3. ``primitives``: room for 16,384 compiled shapes instead of 1,024
4. ``optimizer``: ``SubsetAdamW`` with row-sparse word gradients
5. ``dropout``: counter dropout, and attention by two products and a softmax
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sensikernels.bench.rows import row, to_dicts, write_dicts
from sensikernels.bench.step import Step, hugging_face, minilm, sentences
from sensikernels.bench.timing import interleave
from sensikernels.hf import apply, compact, sensitivity, use_counter_dropout
from sensikernels.masks import Budget, plan, tokens_of
from sensikernels.ops.subset_adamw import SubsetAdamW

STAGES = ("trim", "lengths", "primitives", "optimizer", "dropout")
CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def measure(stage: str, data_dir: Path | None, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One row: the stage against stock dense training, in this process."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("medium")
    level = STAGES.index(stage)
    grouped = {"pad_to_multiple": 8, "bucket": 32} if level else {"pad_to_multiple": 1, "bucket": 1}
    batches = sentences(data_dir, rounds, **grouped)
    base = minilm().train()
    trimmed = trim(copy.deepcopy(base), batches).to(dtype)
    if level >= 4:
        use_counter_dropout(trimmed)
    base = base.to(dtype)
    steps = {"hf-dynamic": hugging_face(base), stage: _step(trimmed, level)}
    takes = {name: _taking(step, batches) for name, step in steps.items()}
    # One pass is not warm: lengths that have not repeated yet are what is being measured.
    times = interleave(takes, rounds=rounds, warmup=3)
    made = row(
        suite="ablation",
        case="demo-minilm-32" if data_dir is None else "sst2-minilm-32",
        candidate=stage,
        baseline="hf-dynamic",
        density=0.5,
        tokens=round(sum(map(tokens_of, batches)) / len(batches)),
        dtype=str(dtype).removeprefix("torch."),
        direction="step",
        candidate_time=times[stage],
        baseline_time=times["hf-dynamic"],
    )
    return to_dicts([made])[0]


def trim(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> nn.Module:
    """The ranked half of ``model`` as a plain HuggingFace model."""
    apply(model, plan(sensitivity(model, batches[:16]), Budget(flops=0.5)))
    return compact(model)


def _step(model: nn.Module, level: int) -> Step:
    if level < 3:
        return hugging_face(model)
    words: Any = model.get_input_embeddings()  # type: ignore[operator]
    words.sparse = True
    return Step(
        model=model, optimizer=SubsetAdamW(model.parameters(), lr=1e-5, max_grad_norm=1.0)
    )


def _taking(step: Step, batches: list[dict[str, torch.Tensor]]) -> Any:
    turn = cycle(batches)
    return lambda: step(next(turn))


def main() -> int:
    """Run every stage in its own process and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--data-dir", type=Path, help="GLUE's folders; without it the demo task")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        made = measure(given.stage, given.data_dir, getattr(torch, given.dtype), given.rounds)
        print(json.dumps(made))
        return 0
    rows = []
    for level, stage in enumerate(STAGES):
        environment = {k: v for k, v in os.environ.items() if k != CACHE}
        environment |= {CACHE: "16384"} if level >= 2 else {}
        command = [sys.executable, "-m", "sensikernels.bench.ablation", "--stage", stage,
                   "--rounds", str(given.rounds), "--dtype", given.dtype]  # fmt: skip
        command += ["--data-dir", str(given.data_dir)] if given.data_dir else []
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return done.returncode
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        last = rows[-1]
        print(f"{stage:<11} {last['candidate_ms']:7.1f} ms, dense {last['baseline_ms']:7.1f} ms, "
              f"x{last['ratio']:.2f}", flush=True)  # fmt: skip
    if given.json:
        write_dicts(given.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
