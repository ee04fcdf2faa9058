"""The gain of each feature of the step on short real batches: ``python -m bench.studies.ablation``.

MiniLM, 32 sentences a batch in random order. Every stage runs in a process of its own (oneDNN
reads its cache size once), interleaved there with stock HuggingFace training on the same sentences.
Stages add up, each with what came before:

1. ``primitives``: room for 16,384 compiled shapes instead of 1,024 (a CPU's)
2. ``optimizer``: ``SubsetAdamW``, clipping folded in
3. ``words``: row-sparse gradient and update of the word table
4. ``dropout``: counter dropout, and attention by two products and a softmax
5. ``packed``: no padding: tokens end to end, attention by sentence
6. ``cls``: the last layer on one token a sentence
7. ``fused``: one QKV product; bias + GELU, dropout + residual + LayerNorm, embeddings in one pass

Then each of these alone on top: ``precision`` (bf16 with fp32 master weights), ``graph`` (the whole
step a CUDA graph; on a GPU), ``trim`` (half the FLOPs by a ranked plan), ``frozen`` (the lowest two
thirds), ``cached`` (those without dropout and their output kept: epochs after the first).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sensikernels._core.products import fastest
from sensikernels.bench.contestants import (
    FLOPS_SHARE,
    FROZEN_SHARE,
    Contestant,
    Race,
    hugging_face,
    our_optimizer,
    packed,
    padded,
)
from sensikernels.bench.rows import row, to_dicts, write_dicts
from sensikernels.bench.sentences import sentences
from sensikernels.bench.step_cases import minilm
from sensikernels.bench.timing import interleave
from sensikernels.hf import STEP_FEATURES, apply, cache_frozen_prefix, sensitivity
from sensikernels.masks import Budget, Geometry, plan
from sensikernels.methods.freeze import drop_nothing_below, frozen_lowest
from sensikernels.training.graph import GraphedStep

PATH = ("primitives", "optimizer", "words", "dropout", "packed", "cls", "fused")
ENDS = ("precision", "graph", "trim", "frozen", "cached")
STAGES = (*PATH, *ENDS)
CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def measure(
    stage: str, data_dir: Path | None, dtype: torch.dtype, rounds: int, device: str
) -> dict[str, Any]:
    """One row: the stage against stock dense training, in this process."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(fastest(device))
    task = "demo" if data_dir is None else "sst2"
    base = minilm().train().to(device=device, dtype=dtype)
    race = Race(base=base, rows=sentences(task, data_dir, 16), device=device)
    stock = race.make("hf-dynamic")
    if stage == "precision":
        race = replace(race, base=base.to(torch.bfloat16))
    mine = contestant(race, stage)
    # Each batch's shape once: a cache is then full, a graph captured.
    warmup = 3 * len(race.rows) if stage in ("graph", "cached") else 4
    times = interleave(
        {"hf-dynamic": stock, stage: mine}, rounds=rounds, warmup=warmup, device=device
    )
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


def contestant(race: Race, stage: str) -> Contestant:
    """The step with every part of ``PATH`` up to ``stage``; of ``ENDS`` this one alone."""
    model = race.make("hf-dynamic").model
    on = set(PATH if stage in ENDS else PATH[: PATH.index(stage) + 1])
    batches = race.batches(packed if "packed" in on else padded)
    parts = on & set(STEP_FEATURES)
    if parts:
        apply(model, features=parts)
    if "optimizer" not in on:
        return hugging_face(model, batches)
    made = Contestant(model=model, optimizer=our_optimizer(model), batches=batches)
    if stage == "trim":
        scores = sensitivity(model, race.batches(partial(padded, multiple=8))[:8])
        chosen = plan(
            scores, Budget(flops=FLOPS_SHARE), geometry=Geometry.uniform(race.mean_length)
        )
        apply(model, chosen, optimizer=made.optimizer)
    elif stage in ("frozen", "cached"):
        apply(model, frozen_lowest(model, FROZEN_SHARE))
    if stage == "cached":
        drop_nothing_below(model, FROZEN_SHARE)
        cache_frozen_prefix(model)
    if stage == "graph":
        made.graphs = GraphedStep(model, made.optimizer)
    return made


def main() -> int:
    """Run every stage in its own process and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--data-dir", type=Path, help="GLUE's folders; without it the demo task")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        dtype = getattr(torch, given.dtype)
        made = measure(given.stage, given.data_dir, dtype, given.rounds, given.device)
        print(json.dumps(made))
        return 0
    rows = []
    for stage in STAGES:
        if stage == "graph" and given.device == "cpu":
            print("graph       skipped: CUDA graphs need a CUDA device")
            continue
        environment = {k: v for k, v in os.environ.items() if k != CACHE} | {CACHE: "16384"}
        command = [
            sys.executable,
            "-m",
            "bench.studies.ablation",
            "--stage",
            stage,
            "--rounds",
            str(given.rounds),
            "--dtype",
            given.dtype,
            "--device",
            given.device,
        ]
        command += ["--data-dir", str(given.data_dir)] if given.data_dir else []
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return done.returncode
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        last = rows[-1]
        print(
            f"{stage:<11} {last['candidate_ms']:7.1f} ms, HF {last['baseline_ms']:7.1f} ms, "
            f"x{last['ratio']:.2f}",
            flush=True,
        )
    if given.json:
        write_dicts(given.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
