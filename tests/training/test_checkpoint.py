"""Checkpoints and outputs: whole or absent, and never read back wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sensikernels._core.errors import CheckpointError, SensiError, UsageError
from sensikernels.masks import Budget
from sensikernels.training import checkpoint, finetune
from sensikernels.training.output import output_folder, write_json, writing

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.sampled_from([torch.ones(2), torch.ones(2, 3, dtype=torch.bfloat16), torch.empty(0)]),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(), st.integers()), inner, max_size=3),
    ),
    max_leaves=12,
)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and all(map(same, one, other)) and len(one) == len(other)
    return type(one) is type(other) and one == other


@given(TREES)
def test_flatten_is_undone(tree):
    tensors = {}
    plain = json.loads(json.dumps(checkpoint.flatten(tree, tensors)))
    assert same(checkpoint.unflatten(plain, tensors), tree)


def test_flatten_refuses_what_it_cannot_bring_back():
    with pytest.raises(TypeError, match="set"):
        checkpoint.flatten({"a": {1}}, {})


def test_shared_views_and_empty_tensors_come_back(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    state = {"a": base, "b": base[1], "c": base.t(), "d": torch.empty(0), "e": torch.empty(0)}
    checkpoint.save(tmp_path, 1, state, settings={}, plan=None)
    loaded, plan = checkpoint.load(checkpoint.latest(tmp_path), settings={})
    assert plan is None
    assert same(loaded, state)


def test_only_the_newest_stays(tmp_path):
    for step in (5, 10):
        checkpoint.save(tmp_path, step, {"step": step}, settings={}, plan=None)
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["step-00000010"]


@pytest.fixture
def stopped(settings):
    """Settings whose output holds a checkpoint of an unfinished run."""
    asked = settings(checkpoint_every=2, options={"warmup": 0.0})

    def stop(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(asked, stop)
    return settings(checkpoint_every=2, options={"warmup": 0.0}, resume=True)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def edit(path):
    path.write_text(path.read_text().replace('\\"epoch\\"', '\\"epocH\\"', 1))


def empty(path):
    path.write_text("{}")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.safetensors", truncate),
        ("state.safetensors", flip),
        ("state.safetensors", lambda p: p.unlink()),
        ("state.json", truncate),
        ("state.json", edit),
        ("state.json", empty),
        ("state.json", lambda p: p.unlink()),
        ("plan.json", empty),
        ("plan.safetensors", truncate),
    ],
)
def test_a_corrupt_checkpoint_is_refused(stopped, name, damage):
    before = (path := checkpoint.latest(stopped.output) / name).read_bytes()
    damage(path)
    assert not path.exists() or path.read_bytes() != before
    with pytest.raises(CheckpointError, match="checkpoint"):
        finetune(stopped)
    assert not (stopped.output / "report.json").exists()


def test_a_run_trimmed_by_dimensions_resumes(settings, tmp_path):
    given = {
        "options": {"warmup": 0.0, "granularity": "dimensions"},
        "checkpoint_every": 2,
        "budget": Budget(flops=0.7),
    }

    def stop(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(settings(**given), stop)
    again = finetune(settings(**given, resume=True))
    whole = finetune(settings(**given, output=tmp_path / "whole"))
    assert again["losses"] == whole["losses"]
    assert again["kept"] == whole["kept"]


@pytest.mark.parametrize(
    "changed",
    [
        {"lr": 1e-3},
        {"seed": 1},
        {"epochs": 2},
        {"budget": Budget(flops=0.7)},
        {"compare_dense": True},
        {"dtype": "bf16"},
        {"options": {"warmup": 0.5}},
        {"max_train_samples": 80},
    ],
    ids=lambda c: next(iter(c)),
)
def test_other_settings_are_refused_by_name(stopped, settings, changed):
    named = {"checkpoint_every": 2, "options": {"warmup": 0.0}, "resume": True, **changed}
    with pytest.raises(CheckpointError, match=f"{next(iter(changed))}: expected .*, got"):
        finetune(settings(**named))


def test_other_data_under_the_same_name_is_refused(stopped, monkeypatch):
    monkeypatch.setattr("sensikernels.training.data.Data.fingerprint", lambda self: "0")
    with pytest.raises(CheckpointError, match="data: expected"):
        finetune(stopped)


def test_resume_without_a_checkpoint_starts_anew(settings):
    asked = settings(resume=True)
    asked.output.mkdir()
    assert len(finetune(asked)["losses"]["planned"]) == 6


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "what",
    [
        "safetensors.torch.save_file",
        "sensikernels.masks.Plan.save",
        "sensikernels._core.files._sync",
        "pathlib.Path.mkdir",
    ],
)
def test_a_full_disk_leaves_the_older_checkpoint(stopped, monkeypatch, what):
    kept = checkpoint.latest(stopped.output)
    monkeypatch.setattr(what, full_disk)
    with pytest.raises(SensiError, match="No space left on device"):
        finetune(stopped)
    names = {str(p.relative_to(stopped.output)) for p in stopped.output.rglob("*") if p.is_dir()}
    assert names == {"checkpoint", f"checkpoint/{kept.name}"}
    monkeypatch.undo()
    assert len(finetune(stopped)["losses"]["planned"]) == 6


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_really_is_full(settings, small_disk):
    asked = settings(output=small_disk / "out", checkpoint_every=2)
    with pytest.raises(SensiError, match=r"cannot be written: .*(No space|os error 28)"):
        finetune(asked)
    assert [p for p in small_disk.rglob("*") if p.is_file()] == []


def test_a_failed_run_leaves_no_folder(tmp_path):
    with pytest.raises(KeyError), output_folder(tmp_path / "a" / "b", resume=False):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_keeps_what_was_there(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(KeyError), output_folder(tmp_path / "a", resume=False):
        raise KeyError
    assert (tmp_path / "a").is_dir()


def test_outputs_that_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for path, resume, said in (
        (file, False, "a folder"),
        (tmp_path, False, "empty or new folder"),
        (tmp_path, True, "without a checkpoint"),
    ):
        with pytest.raises(UsageError, match=said), output_folder(path, resume=resume):
            pytest.fail("entered")
    with pytest.raises(SensiError, match="cannot be made"):
        with output_folder(file / "below", resume=False):
            pytest.fail("entered")
    assert file.read_text() == "mine"


def test_writing_replaces_only_when_it_is_whole(tmp_path):
    target = tmp_path / "x.json"
    write_json(target, [1])

    def half():
        with writing(target) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert json.loads(target.read_text()) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    with writing(tmp_path / "folder") as temporary:
        shutil.copytree(tmp_path, temporary, ignore=shutil.ignore_patterns(".folder*"))
    assert (tmp_path / "folder" / "x.json").exists()
