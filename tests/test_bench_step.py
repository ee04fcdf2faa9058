"""``bench step``: which cases run, and who races in one that is asked for by name."""

from __future__ import annotations

import pytest

from sensikernels._core.errors import UsageError
from sensikernels.bench import step
from sensikernels.cli.app import main


def test_a_case_by_name_has_every_contestant() -> None:
    quick = {one.name: one for one in step.cases(True, "cpu", None)}
    assert "hf-compiled" in quick["demo-minilm-32"].without
    chosen = step.named(["bert-base-8x128", "demo-minilm-32"], "cpu", None)
    assert [one.name for one in chosen] == ["bert-base-8x128", "demo-minilm-32"]
    assert chosen[1].without == ()
    assert chosen[1].rounds > quick["demo-minilm-32"].rounds


def test_a_case_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="case: expected one of .*demo-minilm-32.*'sst2'"):
        step.run(device="cpu", quick=True, progress=print, case=["sst2"])
    assert main(["bench", "linear", "--case", "demo-minilm-32"]) == 2
    assert "case: expected none for suite linear" in capsys.readouterr().err


def test_only_those_asked_for_race() -> None:
    (case,) = step.named(["bert-base-8x128"], "cpu", None)
    few = step.among(case, ["hf-dynamic", "dense"])
    assert [who for who in (*step.HF, *step.OURS) if who not in few.without] == [
        "hf-dynamic",
        "dense",
    ]
    with pytest.raises(UsageError, match="only: expected one of"):
        step.among(case, ["hf"])
