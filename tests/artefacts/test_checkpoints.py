"""Damaged checkpoints are refused by name, and leave the run as it was."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensikernels._core.files import digest_of_file
from sensikernels.masks import Budget
from sensikernels.training import Settings, checkpoint, finetune
from sensikernels.training.loop import prepare
from tests.artefacts.damage import cuts, flips, text_of, values
from tests.training.tiny import save_tiny

FILES = ("state.json", "state.safetensors", "plan.json", "plan.safetensors")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Settings of a run that stopped after its second step, with a checkpoint of it."""
    root = tmp_path_factory.mktemp("run")
    asked = Settings(
        task="demo",
        model=str(save_tiny(root / "model")),
        output=root / "out",
        device="cpu",
        budget=Budget(flops=0.6),
        options={"warmup": 0.0},
        max_train_samples=64,
        batch_size=16,
        ranking_rows=32,
        checkpoint_every=2,
    )

    def stop(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(asked, stop)
    return asked


@pytest.fixture(scope="module")
def identity(stopped):
    from sensikernels.training.session import _identity

    session = prepare(stopped)
    return session, _identity(stopped, session.data)


@pytest.fixture
def folder(stopped, tmp_path):
    """A copy of the checkpoint, to spoil."""
    found = checkpoint.latest(stopped.output)
    return shutil.copytree(found, tmp_path / "checkpoint" / found.name)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("name", FILES)
def test_bytes(folder, identity, refused, name):
    settings = identity[1]
    file = folder / name
    whole, (state, _) = file.read_bytes(), checkpoint.load(folder, settings=settings)
    for what, spoiled in [*cuts(whole), *flips(whole, 25)]:
        file.write_bytes(spoiled)
        got = refused(lambda: checkpoint.load(folder, settings=settings), folder, what)
        assert got is None or same(got[0], state), what


def test_files_missing_or_of_another_run(folder, identity, refused):
    for name in FILES:
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        assert refused(lambda: checkpoint.load(folder, settings=identity[1]), folder, name) is None
        (folder / name).mkdir()
        assert refused(lambda: checkpoint.load(folder, settings=identity[1]), folder, name) is None
        (folder / name).rmdir()
        (folder / name).write_bytes(whole)
    other = {**identity[1], "data": "another's"}
    assert refused(lambda: checkpoint.load(folder, settings=other), folder, "of other data") is None


def seal(folder, body):
    """Write ``body`` with the digest that a forger would give it."""
    text = body if isinstance(body, str) else json.dumps(body)
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    (folder / "state.json").write_bytes(text_of({"sha256": digest, "body": text}))


def test_every_field_forged(folder, identity, refused):
    """With digests that fit, a value of the wrong kind is none of a run; a session refuses it."""
    session, settings = identity
    body = json.loads(json.loads((folder / "state.json").read_text())["body"])
    for what, spoiled in values(body, 4, seed=2):
        seal(folder, spoiled)
        got = refused(lambda: checkpoint.load(folder, settings=settings), folder, what)
        # An equal number of another kind, 0 for 0.0, says the same.
        assert got is None or spoiled == body or what[:8] == "('state'", what
    deep = '{"a":' * 3000 + "1" + "}" * 3000
    seal(folder, json.dumps(body)[:-1] + f', "more": {deep}}}')
    assert refused(lambda: checkpoint.load(folder, settings=settings), folder, "deep") is None
    for names in (["../out"], ["/etc/passwd"], ["state.safetensors", "../../x"]):
        seal(folder, {**body, "files": dict.fromkeys(names, "0" * 64)})
        assert refused(lambda: checkpoint.load(folder, settings=settings), folder, "names") is None


def test_a_session_takes_no_state_that_is_not_its_own(stopped, folder, identity, refused):
    state = checkpoint.unflatten(
        json.loads(json.loads((folder / "state.json").read_text())["body"])["state"],
        load_file(folder / "state.safetensors"),
    )
    session, _ = identity
    for name, bad in (
        ("epoch", -1),
        ("epoch", 7),
        ("epoch", "0"),
        ("batch", 10**9),
        ("batch", True),
        ("tokens", []),
        ("tokens", [-1, 1]),
        ("tokens", "ab"),
        ("seconds", {}),
        ("seconds", {"setup": -1.0, "wall": 0.0}),
        ("runners", []),
        ("runners", None),
    ):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            session._check_place(folder, {**state, name: bad})
    runner = session.runner
    (own,) = state["runners"]
    runner.check_state(own, 2)
    for name, bad in (
        ("losses", [1.0]),
        ("losses", [1, 2]),
        ("step_ms", None),
        ("changed_at", 3),
        ("step", 5),
        ("changed_at", -1),
        ("trimmed_at", 3),
        ("trimmed_at", 1.0),
        ("events", [1]),
        ("epochs", [{"accuracy": "high"}]),
        ("seconds", {}),
        ("random", [{"cpu": torch.zeros(3)}]),
        ("random", 3),
    ):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            runner.check_state({**own, name: bad}, 2)
    with pytest.raises(ValueError, match="state: expected"):
        runner.check_state({k: v for k, v in own.items() if k != "model"}, 2)


@pytest.mark.parametrize("what", ["nan", "float64", "shape", "swapped", "row clocks"])
def test_forged_tensors(stopped, folder, identity, what):
    """Whoever resumes from them gets one line, and no report."""
    from dataclasses import replace

    from sensikernels._core.errors import CheckpointError

    body = json.loads(json.loads((folder / "state.json").read_text())["body"])
    tensors = load_file(folder / "state.safetensors")
    clocks = what == "row clocks"
    name = next(
        n
        for n, t in sorted(tensors.items())
        if t.is_floating_point() and t.ndim == 2 and (t.shape[1] == 5 or not clocks)
    )
    tensors[name] = {
        "nan": torch.full_like(tensors[name], float("nan")),
        "float64": tensors[name].double(),
        "shape": tensors[name][:1].clone(),
        "row clocks": tensors[name][:1].clone(),
        "swapped": tensors[name].flatten().clone(),
    }[what]
    save_file(tensors, folder / "state.safetensors")
    body["files"]["state.safetensors"] = digest_of_file(folder / "state.safetensors")
    seal(folder, body)
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(CheckpointError, match="step-00000002") as caught:
        finetune(replace(stopped, output=folder.parents[1], resume=True))
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parents[1].iterdir()] == ["checkpoint"]
