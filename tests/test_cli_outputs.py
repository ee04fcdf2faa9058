"""The files and numbers that a command is given: what cannot be is refused before any work."""

from __future__ import annotations

import pytest

from sensikernels.cli import main
from tests.test_cli import one_line


def write_png(path):
    path.write_bytes(b"\x89PNG\r\n\x1a\n")


STRANGERS = [
    ("plan --task demo --flops 0.5 --output {}/plan.json", "plan.json"),
    ("plan --task demo --flops 0.5 --output {}/plan.json", "plan.safetensors"),
    ("plan --task demo --flops 0.5 --output {}/x/plan.json", "x"),
    ("tune --device cpu --output {}/table.json", "table.json"),
    ("tune --device cpu --costs {}/costs.json", "costs.json"),
    ("bench linear --json {}/rows.json", "rows.json"),
    ("bench linear --json {}/rows.json", "rows.jsonl"),
    ("bench linear --json {}/rows.json", "rows.jsonl.old"),
    ("bench linear --json {}/rows.json", "rows.provenance.json"),
    ("bench linear --picture {}/roofline.png", "roofline.png"),
]


@pytest.mark.parametrize(("command", "name"), STRANGERS, ids=[f"{c} {n}" for c, n in STRANGERS])
def test_no_command_overwrites_a_strangers_file(tmp_path, capsys, monkeypatch, command, name):
    """Nor does it begin its work: whatever would be loaded or timed is not."""
    for place in (
        "sensikernels.training.loop.prepare",
        "sensikernels.nn.tune._break_even",
        "sensikernels.bench.linear.run",
    ):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("work began"))
    for content in (b"precious", b"{}", b"[1]", b""):
        (tmp_path / name).write_bytes(content)
        assert main(command.format(tmp_path).split()) == 2
        captured = capsys.readouterr()
        assert "expected" in one_line(captured.err)
        assert captured.out == ""
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {name: content}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("plan --task demo --flops 0.5 --output {}/p.safetensors", "another file than output's"),
        ("plan --task demo --flops 0.5 --output {}", "expected a file, got the folder"),
        ("bench linear --json {}/a.jsonl", "another file than json's"),
        ("bench linear --json {}/a.json --picture {}/a.json", "another file than --json"),
        ("bench linear --json {}/a.json --picture {}/b/../a.jsonl", "another file than --json"),
        ("bench linear --json /proc/none/a.json", "expected a folder that can be written to"),
        ("bench linear --seconds nan", "--seconds"),
        ("bench linear --seconds inf", "seconds: expected a finite number"),
        ("bench linear --rounds 0", "--rounds"),
        ("bench linear --rounds 99999999999", "--rounds"),
        ("bench finetune --seeds -1", "--seeds"),
        ("bench finetune --samples 1e9", "--samples"),
        ("bench linear --device tpu", "device: expected cpu or cuda"),
    ],
)
def test_outputs_and_numbers_that_cannot_be(tmp_path, capsys, monkeypatch, command, said):
    monkeypatch.setattr("sensikernels.bench.linear.run", lambda **_: pytest.fail("work began"))
    if "/proc/none" in command:
        monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    assert main(command.format(tmp_path, tmp_path).split()) == 2
    assert said in one_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_command_replaces_what_it_wrote_itself(tmp_path, monkeypatch):
    from sensikernels.bench.rows import Row

    made = Row(
        suite="linear",
        case="c",
        candidate="a",
        baseline="b",
        candidate_ms=1.0,
        baseline_ms=2.0,
        ratio=2.0,
        spread=0.1,
        n=3,
    )
    monkeypatch.setattr("sensikernels.bench.linear.run", lambda **_: [made])
    monkeypatch.setattr("sensikernels.bench.roofline.draw", lambda rows, path: write_png(path))
    command = f"bench linear --json {tmp_path}/a.json --picture {tmp_path}/a.png".split()
    for _ in range(2):
        assert main(command) == 0
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"a.json", "a.provenance.json", "a.png"}
