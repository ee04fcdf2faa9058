"""What a budget costs and gains: ``python -m bench.studies.curve TASK DATA --output DIR``.

MiniLM, bf16, at most 5,000 training rows (of SQuAD 2,000 questions), scored on 1,500 development
rows (1,000 questions). Dense trains for three epochs, half the FLOPs for 3.75, a quarter for five,
which takes about as long; the table has the seconds. Three seeds of these; one of the controls
(uniform, random, reversed, a smaller dense model) and, where asked for, of every other method. With
``--choose`` the learning rates of the three are chosen on held-out training rows, by the same
factors for each; without, they are those that were chosen so. DATA is the folder of GLUE's folders,
or SQuAD's own. The same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sensikernels.bench.rows import write_json
from sensikernels.compare import compare
from sensikernels.methods import BASELINE
from sensikernels.training import Settings

TASKS = ("sst2", "qnli", "qqp", "mnli", "mrpc", "stsb", "squad")
EPOCHS, HALF, QUARTER = 3, 3.75, 5
ROWS, QUESTIONS = (5000, 1500), (2000, 1000)
"""To train on, to be scored on."""
FACTORS = (0.5, 1.0, 2.0, 4.0)
CONTROLS = (
    f"sensi-bert@0.5/{HALF}:ranking=uniform",
    f"sensi-bert@0.5/{HALF}:ranking=random",
    f"sensi-bert@0.5/{HALF}:ranking=reversed",
    f"fewer-layers@0.5/{HALF}:lr=1e-4",
)
VARIANTS = (
    f"sensi-bert@0.5/{HALF}:granularity=dimensions",
    f"sensi-bert@0.5/{HALF}:allocation=tensors",
)
METHODS = (
    "freeze:share=0.34:cache=true:lr=1e-4",
    "freeze:cache=true:lr=1e-4",
    "autofreeze:cache=true:lr=1e-4",
    "green-trainer:share=0.6:lr=1e-4",
    "lisa:lr=1e-4",
    "grow:lr=1e-4",
    "bitfit",
    "s2ft",
    "smt",
    "far:lr=1e-4",
    "lora",
    "dsee",
    "sift",
    "dps",
    "dps:variant=mix",
    "child-tuning",
    "child-tuning:variant=F",
    "lnsr:lr=1e-4",
)


def main() -> int:
    """Run what is missing, and write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("data", type=Path, help="GLUE's folders, or SQuAD's own folder")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", action="store_true", help="every other method, too")
    parser.add_argument("--choose", action="store_true", help="choose learning rates first")
    parser.add_argument("--json", type=Path, help="write the comparison here as well")
    given = parser.parse_args()
    train, scored = QUESTIONS if given.task == "squad" else ROWS
    common = Settings(
        task=given.task,
        data_dir=given.data,
        output=given.output,
        method=BASELINE.name,
        dtype="bf16",
        epochs=EPOCHS,
        max_train_samples=train,
        max_eval_samples=scored,
        eval_steps=0 if given.task == "squad" else 40,
        device="cpu",
    )
    content = compare(
        common,
        [
            "dense" if given.choose else "dense:lr=1e-4",
            f"sensi-bert@0.5/{HALF}",
            f"sensi-bert@0.25/{QUARTER}",
        ],
        once=[*CONTROLS, *(VARIANTS + METHODS if given.methods else ())],
        seeds=given.seeds,
        factors=FACTORS if given.choose else (1.0,),
        progress=lambda line: print(line, flush=True),
    )
    if given.json:
        write_json(given.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
