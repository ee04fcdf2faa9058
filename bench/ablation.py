"""What each part of the step adds on short real batches: ``python -m sensikernels.bench.ablation``.

MiniLM, 32 sentences a batch in random order. Every stage runs in a process of its own (oneDNN
reads its cache size once), interleaved there with stock HuggingFace training on the same sentences.
Stages add up, each with what came before:

1. ``primitives``: room for 16,384 compiled shapes instead of 1,024
2. ``optimizer``: ``SubsetAdamW``, row-sparse word gradients, clipping folded in
3. ``dropout``: counter dropout, and attention by two products and a softmax
4. ``packed``: no padding: tokens end to end, attention by sentence
5. ``cls``: the last layer on one token a sentence
6. ``fused``: one QKV product; bias + GELU, dropout + residual + LayerNorm, embeddings in one pass
7. ``trim``: half the FLOPs by a ranked plan; 8. ``frozen``: instead, the lowest two thirds frozen
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sensikernels.bench.contestants import (
    FLOPS_SHARE,
    FROZEN_SHARE,
    Contestant,
    Race,
    frozen_lowest,
    hugging_face,
    our_optimizer,
    packed,
    padded,
)
from sensikernels.bench.rows import row, to_dicts, write_dicts
from sensikernels.bench.step import minilm, sentences
from sensikernels.bench.timing import interleave
from sensikernels.hf import apply, sensitivity, use_counter_dropout, use_packed
from sensikernels.masks import Budget, plan

STAGES = ("primitives", "optimizer", "dropout", "packed", "cls", "fused", "trim", "frozen")
CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def measure(stage: str, data_dir: Path | None, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One row: the stage against stock dense training, in this process."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("medium")
    task = "demo" if data_dir is None else "sst2"
    race = Race(base=minilm().train().to(dtype), rows=sentences(task, data_dir, 16), device="cpu")
    stock = race.make("hf-dynamic")
    mine = contestant(race, STAGES.index(stage))
    times = interleave({"hf-dynamic": stock, stage: mine}, rounds=rounds, warmup=4)
    made = row(
        suite="ablation",
        case=f"{task}-minilm-32",
        candidate=stage,
        baseline="hf-dynamic",
        density=FLOPS_SHARE if stage == "trim" else 1.0,
        tokens=round(race.tokens),
        dtype=str(dtype).removeprefix("torch."),
        direction="step",
        candidate_time=times[stage],
        baseline_time=times["hf-dynamic"],
    )
    return to_dicts([made])[0]


def contestant(race: Race, level: int) -> Contestant:
    """The step with every part up to ``STAGES[level]``."""
    model = race.make("hf-dynamic").model
    on = set(STAGES[: level + 1])
    batches = race.batches(packed if "packed" in on else padded)
    if "dropout" in on:
        use_counter_dropout(model)
    if "packed" in on:
        use_packed(model, cls_only="cls" in on, fused="fused" in on)
    if "optimizer" not in on:
        return hugging_face(model, batches)
    words: Any = model.get_input_embeddings()  # type: ignore[operator]
    words.sparse = True
    made = Contestant(model=model, optimizer=our_optimizer(model), batches=batches)
    if STAGES[level] == "trim":
        scores = sensitivity(model, race.batches(partial(padded, multiple=8))[:8])
        chosen = plan(scores, Budget(flops=FLOPS_SHARE), sequence_length=race.mean_length)
        apply(model, chosen, optimizer=made.optimizer)
    elif STAGES[level] == "frozen":
        apply(model, frozen_lowest(model, FROZEN_SHARE))
    return made


def main() -> int:
    """Run every stage in its own process and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--data-dir", type=Path, help="GLUE's folders; without it the demo task")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        made = measure(given.stage, given.data_dir, getattr(torch, given.dtype), given.rounds)
        print(json.dumps(made))
        return 0
    rows = []
    for stage in STAGES:
        environment = {k: v for k, v in os.environ.items() if k != CACHE} | {CACHE: "16384"}
        command = [sys.executable, "-m", "sensikernels.bench.ablation", "--stage", stage,
                   "--rounds", str(given.rounds), "--dtype", given.dtype]  # fmt: skip
        command += ["--data-dir", str(given.data_dir)] if given.data_dir else []
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return done.returncode
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        last = rows[-1]
        print(f"{stage:<11} {last['candidate_ms']:7.1f} ms, HF {last['baseline_ms']:7.1f} ms, "
              f"x{last['ratio']:.2f}", flush=True)  # fmt: skip
    if given.json:
        write_dicts(given.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
