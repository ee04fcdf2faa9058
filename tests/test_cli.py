"""The command line: what it prints, and one clear line for everything that can be wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys

import pytest

from sensikernels.cli import main
from tests.training.tiny import save_tiny

ROWS = ["a fine film\t1", "a dull film\t0", "the plot was gripping\t1", "the plot was stale\t0"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def call(tiny, tmp_path, capsys):
    """Exit code, stdout and stderr of ``finetune`` into ``tmp_path / "out"``."""

    def run(
        extra="",
        *,
        base="--task demo --max-train-samples 64 --batch-size 16 --flops 0.6",
        command="finetune",
    ):
        places = f"--model {tiny} --device cpu"
        if command == "finetune":
            places += f" --output {tmp_path / 'out'}"
        code = main(f"{command} {base} {places} {extra}".split())
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def glue(tmp_path):
    """Writes SST-2 with these rows and gives the folder's option."""

    def write(rows, header="sentence\tlabel"):
        folder = tmp_path / "glue" / "SST-2"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("train.tsv", "dev.tsv"):
            (folder / name).write_text("\n".join([header, *rows]) + "\n")
        return f"--data-dir {folder.parent}"

    return write


def one_line(err):
    assert err.startswith("sensikernels: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_finetune_prints_the_table_and_writes_the_report(call, tmp_path):
    code, out, err = call("--compare-dense --checkpoint-every 2")
    assert (code, err) == (0, "")
    for text in ("median step, ms", "budget: asked flops 0.6", "bit-equal", "accuracy"):
        assert text in out, text
    assert re.search(r"\d\.\d\dx (faster|slower)", out)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["task"] == "demo"


def test_a_folder_of_tsvs_and_regression(call, glue, tmp_path):
    code, _, err = call("--task sst2 --flops 0.7 " + glue(ROWS * 8), base="")
    assert (code, err) == (0, "")
    folder = tmp_path / "glue" / "STS-B"
    folder.mkdir()
    for name in ("train.tsv", "dev.tsv"):
        rows = [f"a fine film\ta dull film\t{i % 6}.0" for i in range(24)]
        (folder / name).write_text("\n".join(["sentence1\tsentence2\tscore", *rows]) + "\n")
    (tmp_path / "out").rename(tmp_path / "first")
    code, out, err = call(f"--task stsb --flops 0.7 --data-dir {folder.parent}", base="")
    assert (code, err) == (0, "")
    assert "spearman" in out


def test_plan_then_finetune_with_it(call, tmp_path):
    path = tmp_path / "plan.json"
    code, out, err = call(f"--output {path}", command="plan")
    assert (code, err) == (0, "")
    assert "layer.0.neurons" in out
    kept = json.loads(path.read_text())["kept"]
    code, _, err = call(f"--plan {path}", base="--task demo --max-train-samples 64")
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["kept"] == kept
    assert report["budget"]["requested"] == 0.6


@pytest.mark.parametrize(
    ("extra", "code", "said"),
    [
        ("--task sst3", 2, "task: expected one of cola, demo"),
        ("--method magic", 2, "method: expected one of autofreeze, bitfit"),
        ("--flops 0", 2, "budget flops: expected a share above 0 and at most 1, got 0"),
        ("--flops -1", 2, "budget flops: expected a share above 0 and at most 1, got -1"),
        ("--flops 1.5", 2, "budget flops: expected a share above 0 and at most 1, got 1.5"),
        ("--flops nan", 2, "budget flops: expected a share"),
        ("--flops half", 2, "--flops"),
        ("--flops 0.01", 2, "(the smallest feasible for this model), got 0.01"),
        ("--params 0.5", 2, "budget: expected exactly one of flops, params, step_time, units"),
        ("--step-time 0.5", 2, "step_time, units, got ['flops', 'step_time']"),
        ("--costs /nowhere/costs.json", 2, "costs: expected none without a step_time budget"),
        ("--scope layer", 2, "budget scope: expected one of global, per_layer"),
        ("--method bitfit", 2, "budget: expected none for method bitfit"),
        ("--method-option colour=red", 2, "method-option: sensi-bert takes allocation, criterion"),
        ("--method lora --method-option rank=2.5", 2, "option rank: expected a whole number"),
        ("--method-option warmup", 2, "method-option: expected key=value"),
        ("--method-option warmup=x", 2, "method-option warmup: expected a number, got 'x'"),
        ("--method-option warmup=2", 2, "warmup: expected a share of the steps"),
        ("--method-option criterion=luck", 2, "criterion: expected one of first-order"),
        ("--dtype fp8", 2, "dtype: expected one of bf16, fp16, fp32"),
        ("--embeddings none", 2, "embeddings: expected one of"),
        ("--epochs 0", 2, "epochs: expected above 0, got 0"),
        ("--batch-size 0", 2, "batch_size: expected at least 1"),
        ("--lr inf", 2, "lr: expected a finite number"),
        ("--seed -1", 2, "seed: expected at least 0"),
        ("--data-dir /tmp", 2, "data_dir: expected none, as demo is generated"),
        ("--bogus", 2, "No such option"),
        ("--lr 1e308", 2, "lr: expected a finite number of at least 0, at most 1e+30"),
        ("--dense-lr nan", 2, "dense_lr: expected a finite number"),
        ("--epochs 1000000000", 2, "epochs: expected at most 10000, got 1e+09"),
        ("--epochs some", 2, "--epochs"),
        ("--batch-size 99999999999999999999", 2, "batch_size: expected at most"),
        ("--max-length 7", 2, "max_length: expected at least 8"),
        ("--max-length 99999999999", 2, "max_length: expected at most"),
        ("--pad-to-multiple 0", 2, "pad_to_multiple: expected at least 1"),
        ("--ranking-rows -3", 2, "ranking_rows: expected at least 1"),
        ("--checkpoint-every -1", 2, "checkpoint_every: expected at least 0"),
        ("--max-train-samples 0", 2, "max_train_samples: expected at least 1"),
        ("--seed 99999999999999999999999", 2, "seed: expected at most"),
        ("--flops 1e308", 2, "budget flops: expected a share"),
        ("--flops inf", 2, "budget flops: expected a share"),
        ("--device cuda", 2, "device: expected one this machine has, got cuda"),
        ("--device tpu", 2, "device: expected one of auto, cpu, cuda"),
        ("--method-option warmup=nan", 2, "warmup: expected a share of the steps"),
        ("--method-option warmup=1e999", 2, "warmup: expected a share of the steps"),
        ("--method-option multiples=neurons:0", 2, "neurons: expected a count from 1"),
        ("--method-option multiples=legs:4", 2, "multiples: expected kinds among"),
        ("--method-option granularity=layers", 2, "granularity: expected one of"),
        ("--method-option statistic=mode", 2, "statistic: expected one of"),
        ("--task sst2 --data-dir /nowhere/glue", 1, "/nowhere/glue"),
        ("--model /nowhere/model", 1, "model /nowhere/model: no such folder"),
        ("--plan /nowhere/plan.json", 2, "budget: expected none beside a plan"),
    ],
    ids=lambda v: v if isinstance(v, str) and v.startswith("--") else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(call, tmp_path, monkeypatch, extra, code, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    got, out, err = call(extra)
    assert (got, out) == (code, "")
    assert said in one_line(err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("units", "said"),
    [
        ("heads", "units: expected pairs like"),
        ("heads=x", "units: expected a whole number"),
        ("heads=" + "9" * 50, "units: expected a number of few digits"),
        ("heads=-1", "budget units['heads']: expected a count of at least 0"),
        ("heads=99", "budget units['heads']: expected at most 8, got 99"),
        ("legs=4", "budget units: expected kinds among"),
        ("heads=0", "at least one kept unit"),
    ],
)
def test_bad_units(call, tmp_path, units, said):
    code, _, err = call(f"--units {units}", base="--task demo --max-train-samples 64")
    assert code == 2
    assert said in one_line(err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([*ROWS, "no label here"], "train.tsv:6: expected 2 tab-separated columns, got 1"),
        ([*ROWS, "too\tmany\tcolumns"], "train.tsv:6: expected 2 tab-separated columns, got 3"),
        ([*ROWS, "a film\t2"], "train.tsv:6: label: expected one of 0, 1, got '2'"),
        ([], "train.tsv: no rows"),
    ],
)
def test_bad_rows_are_named_by_line(call, glue, tmp_path, rows, said):
    code, _, err = call("--task sst2 --flops 0.7 " + glue(rows), base="")
    assert code == 1
    assert said in one_line(err)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(call, glue, tmp_path):
    option = glue(ROWS)
    (tmp_path / "glue" / "SST-2" / "dev.tsv").unlink()
    code, _, err = call("--task sst2 --flops 0.7 " + option, base="")
    assert code == 1
    assert "dev.tsv: no such file" in one_line(err)


def test_a_plan_for_another_model(call, tmp_path):
    other = save_tiny(tmp_path / "other", layers=3)
    path = tmp_path / "plan.json"
    assert call(f"--output {path} --model {other}", command="plan")[0] == 0
    code, _, err = call(f"--plan {path}", base="--task demo --max-train-samples 64")
    assert code == 2
    assert "plan: expected a model with a module bert.encoder.layer.2" in one_line(err)
    path.write_text("{")
    code, _, err = call(f"--plan {path}", base="--task demo --max-train-samples 64")
    assert code == 1
    assert f"plan {path}" in one_line(err)
    assert not (tmp_path / "out").exists()


def test_output_that_is_not_empty_is_left_alone(call, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for extra in ("", "--resume"):
        code, _, err = call(extra)
        assert code == 2
        assert "output: expected" in one_line(err)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_corrupt_checkpoint(call, tmp_path):
    folder = tmp_path / "out" / "checkpoint" / "step-00000002"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    code, _, err = call("--resume")
    assert code == 1
    assert str(folder) in one_line(err)


def test_a_full_disk(call, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("safetensors.torch.save_file", full)
    code, _, err = call("--checkpoint-every 2")
    assert code == 1
    assert "cannot be written: No space left on device" in one_line(err)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_training_that_diverges(call, tmp_path):
    code, _, err = call("--lr 1e30 --method dense", base="--task demo --max-train-samples 64")
    assert code == 1
    assert "training diverged" in one_line(err)


@pytest.mark.parametrize(
    "words",
    [["--help"], ["finetune", "--help"], ["plan", "--help"], ["bench", "--help"], ["doctor"]],
)
def test_help_and_doctor(words, capsys):
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "sensikernels" in out
    if words == ["finetune", "--help"]:
        assert "Examples" in out
        assert "--flops 0.5" in out


def test_no_arguments_show_the_help(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert "finetune" in captured.out
    assert captured.err == ""


def test_as_a_program(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sensikernels.cli",
        "finetune",
        "--task",
        "none",
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert one_line(done.stderr)
    assert done.stdout == ""


def test_every_setting_has_an_option_and_reaches_the_report(call, tmp_path):
    from dataclasses import fields
    from inspect import signature

    from sensikernels.cli.app import finetune
    from sensikernels.data import load
    from sensikernels.training import Settings

    made_of = {"budget": {"flops", "params", "step_time", "units", "scope", "params_scope"}}
    made_of["options"] = {"method_option"}
    options = set(signature(finetune).parameters)
    for name in (field.name for field in fields(Settings)):
        assert made_of.get(name, {name}) <= options, name
        options -= made_of.get(name, {name})
    assert not options
    code, _, err = call(
        "--schedule cosine --warmup-ratio 0.25 --weight-decay 0.02 --max-grad-norm 0.5 "
        "--gradient-accumulation-steps 2 --eval-steps 1 --early-stopping-patience 9 "
        "--early-stopping-threshold 0.01 --keep-best --report-to tensorboard --dtype bf16 "
        f"--predict {tmp_path / 'made.tsv'}"
    )
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["settings"]) == {field.name for field in fields(Settings)}
    asked = {
        "schedule": "cosine",
        "warmup_ratio": 0.25,
        "weight_decay": 0.02,
        "max_grad_norm": 0.5,
        "gradient_accumulation_steps": 2,
        "eval_steps": 1,
        "early_stopping_patience": 9,
        "early_stopping_threshold": 0.01,
        "keep_best": True,
        "report_to": ["tensorboard"],
        "dtype": "bf16",
    }
    assert {name: report["settings"][name] for name in asked} == asked
    assert report["evaluated_at"] == [1, 2]
    made = (tmp_path / "made.tsv").read_text().splitlines()
    assert made[0] == "row\tlabel\tprediction\tnegative\tpositive"
    assert len(made) == 1 + len(load("demo", split="dev"))
