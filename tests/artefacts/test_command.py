"""Through the command: exit code 1, one line that names the file, and nothing changed."""

from __future__ import annotations

import os
import shutil

import pytest

from sensikernels.cli import main
from tests.artefacts.damage import snapshot
from tests.artefacts.test_tables import save_costs
from tests.training.tiny import save_tiny

RUN = "--task demo --max-train-samples 64 --batch-size 16 --device cpu --ranking-rows 32"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model, a plan of it, step costs, and a run with a checkpoint."""
    root = tmp_path_factory.mktemp("whole")
    model = save_tiny(root / "model")
    assert (
        main(f"plan {RUN} --model {model} --flops 0.6 --output {root / 'plan.json'}".split()) == 0
    )
    save_costs(root / "costs.json")
    out = root / "out"
    command = f"finetune {RUN} --model {model} --flops 0.6 --checkpoint-every 1 --output {out}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sensikernels.training.loop.finish", None)
        assert main(command.split()) == 1
    assert [p.name for p in out.iterdir()] == ["checkpoint"]
    return root


def half(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def deep(path):
    path.write_text("[" * 100_000)


def swap(path):
    path.write_bytes(b"\x89PNG\r\n")


CASES = [
    ("plan.json", "--plan {}/plan.json"),
    ("plan.safetensors", "--plan {}/plan.json"),
    ("costs.json", "--step-time 0.7 --costs {}/costs.json"),
    ("model/config.json", "--flops 0.6"),
    ("model/tokenizer.json", "--flops 0.6"),
    ("out/checkpoint/step-00000004/state.json", "--flops 0.6 --checkpoint-every 1 --resume"),
    ("out/checkpoint/step-00000004/state.safetensors", "--flops 0.6 --checkpoint-every 1 --resume"),
    ("out/checkpoint/step-00000004/plan.json", "--flops 0.6 --checkpoint-every 1 --resume"),
]


# A word spelled otherwise is another vocabulary, and no damage that shows.
TRIED = [
    (name, options, damage)
    for name, options in CASES
    for damage in (half, flip, deep, swap)
    if name != "model/tokenizer.json" or damage is not flip
]


@pytest.mark.parametrize(
    ("name", "options", "damage"), TRIED, ids=[f"{d.__name__} {name}" for name, _, d in TRIED]
)
def test_a_damaged_file_is_one_line_and_exit_code_1(whole, tmp_path, capsys, name, options, damage):
    root = shutil.copytree(whole, tmp_path / "root")
    damage(root / name)
    before = snapshot(root)
    output = root / ("out" if "--resume" in options else "new")
    # The settings of a run to resume name its model where it was.
    model = whole / "model" if "--resume" in options else root / "model"
    command = f"finetune {RUN} --model {model} --output {output} {options.format(root)}"
    assert main(command.split()) == 1
    err = capsys.readouterr().err
    assert err.startswith("sensikernels: error: ")
    assert err.count("\n") == 1
    parts = name.split("/")
    assert parts[-1] in err or parts[-2] in err, err
    assert snapshot(root) == before
