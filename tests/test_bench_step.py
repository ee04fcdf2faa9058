"""``bench step``: which cases run, who races in each, and what a round of grouped batches holds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sensikernels._core.errors import DataError, UsageError
from sensikernels.bench import step, step_cases
from sensikernels.bench.contestants import HF, OURS, Race, check
from sensikernels.bench.sentences import grouped, grouped_sentences, shuffled, windows
from sensikernels.bench.timing import by_cycle, summarize
from sensikernels.cli.app import main
from sensikernels.data.rows import TokenRow

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 30522}
LESS = {
    "roberta-base": {"intermediate_size": 48},
    "distilbert": {"intermediate_size": 48},
    "electra-small": {"intermediate_size": 48, "embedding_size": 16},
    "modernbert-base": {"intermediate_size": 48, "vocab_size": 50368},
}
LESS["distilbert"] = {"hidden_dim": 48}


def ids(batches: list[list[TokenRow]]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(row.input_ids.tolist()) for rows in batches for row in rows)


def squad(folder: Path, words: int = 60) -> Path:
    """A folder with an article of that many words a paragraph, in SQuAD's nesting."""
    text = " ".join(["the"] * (words - 1) + ["end"])
    asked = [
        {"question": f"what {n}?", "answers": [{"answer_start": 4, "text": "the"}]} for n in "ab"
    ]
    paragraphs = [{"context": text, "qas": asked} for _ in range(4)]
    folder.joinpath("train.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return folder


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
    assert main(["bench", "linear", "--squad-dir", "here"]) == 2
    assert "squad-dir: expected none for suite linear" in capsys.readouterr().err


def test_only_those_asked_for_race() -> None:
    (case,) = step.named(["bert-base-8x128"], "cpu", None)
    few = step.among(case, ["hf-dynamic", "hf-grouped", "dense"])
    assert few.contestants == ("hf-dynamic", "dense"), "these batches are not grouped"
    with pytest.raises(UsageError, match="only: expected one of"):
        step.among(case, ["hf"])


def test_cases_of_grouped_batches() -> None:
    cases = step_cases.grouped_cases(False, Path("glue"), None)
    assert [case.name for case in cases] == [
        "sst2-roberta-base-32",
        "sst2-distilbert-32",
        "sst2-electra-small-32",
        "sst2-modernbert-base-32",
        "squad-minilm-384-8",
    ]
    assert {case.contestants for case in cases} == {("hf-grouped", "dense", "sensi-bert-0.5")}
    assert set(cases) <= set(step.cases(False, "cpu", Path("glue"))) | set(cases)
    names = [case.name for case in step.cases(False, "cpu", Path("glue"))]
    assert names[-5:] == [case.name for case in cases]
    (quick,) = step.named([cases[0].name], "cpu", Path("glue"), None, True)
    assert quick.rounds < cases[0].rounds


def test_a_cycle_holds_the_same_sentences_for_all() -> None:
    batches = grouped_sentences("demo", None, 4)
    mixed = shuffled(batches, 32)
    assert [len(rows) for rows in batches] == [len(rows) for rows in mixed] == [32] * 4
    assert ids(batches) == ids(mixed)
    longest = [max(len(row.input_ids) for row in rows) for rows in batches]
    assert longest == sorted(longest, reverse=True), "from all over the megabatch"
    assert longest[-1] < longest[0]

    def padding(groups: list[list[TokenRow]]) -> int:
        lengths = [[len(row.input_ids) for row in rows] for rows in groups]
        return sum(max(one) * len(one) - sum(one) for one in lengths)

    assert padding(batches) * 4 < padding(mixed)


def test_batches_are_those_of_transformers_sampler() -> None:
    trainer = pytest.importorskip("transformers.trainer_pt_utils")
    lengths = np.random.default_rng(0).integers(3, 40, 1600).tolist()  # 200 batches of 8
    rows = [TokenRow(np.full(n, at, np.int32), None, 0) for at, n in enumerate(lengths)]
    sampler = trainer.LengthGroupedSampler(
        8, lengths=lengths, generator=torch.Generator().manual_seed(0)
    )
    made = [int(row.input_ids[0]) for batch in grouped(rows, 8) for row in batch]
    assert made == list(sampler)


def test_a_cycle_is_a_sample() -> None:
    timing = by_cycle(summarize([1.0, 3.0, 5.0, 7.0, 100.0]), 2)
    assert (timing.samples_ms, timing.n, timing.median_ms) == ((2.0, 6.0), 2, 4.0)


@pytest.mark.parametrize("name", LESS)
def test_each_shape_trains_at_a_reduced_size(name: str) -> None:
    full = step_cases.SHAPES[name]
    assert isinstance(full, partial)
    sizes = {**SMALL, **LESS[name]}
    if name == "distilbert":
        sizes |= {"n_layers": 2, "dim": 32, "n_heads": 2}
        sizes = {k: v for k, v in sizes.items() if k not in SMALL or k == "vocab_size"}
    torch.manual_seed(0)
    base = partial(full, **sizes)().train()
    rows = grouped_sentences("demo", None, 2, types=name in step_cases.TYPED)
    small = [batch[:4] for batch in rows]
    race = Race(base=base, rows=shuffled(small, 4), device="cpu", grouped=small)
    race.make("hf-grouped")()
    if step._padded_because(base):
        assert name == "modernbert-base", "the one whose fast step may be absent"
        return
    dense = race.make("dense")
    check(race, dense)
    dense()
    race.make("sensi-bert-0.5")()


def test_a_wrong_step_is_not_timed() -> None:
    base = tiny()
    small = [batch[:4] for batch in grouped_sentences("demo", None, 2)]
    race = Race(base=base, rows=small, device="cpu", grouped=small)
    dense = race.make("dense")
    with torch.no_grad():
        dense.model.get_parameter("classifier.bias").add_(torch.tensor([5.0, 0.0]))
    with pytest.raises(AssertionError, match="dense: loss"):
        check(race, dense)


def tiny() -> nn.Module:
    return step_cases.random_model("bert", **SMALL, intermediate_size=48)


def a_case(model: Callable[[], nn.Module], **facts: object) -> step_cases.Case:
    case = step_cases.grouped_cases(True, None, None)[0]
    return replace(case, model=model, **facts)  # type: ignore[arg-type]


def test_a_race_over_cycles() -> None:
    rows = [batch[:4] for batch in grouped_sentences("demo", None, 3)]
    case = a_case(tiny, sentences=lambda: rows)
    made = step.measure(case, torch.float32, "cpu", lambda _: None, count=False)
    pairs = {(one.candidate, one.baseline) for one in made}
    assert pairs == {
        ("dense", "hf-grouped"),
        ("sensi-bert-0.5", "hf-grouped"),
        ("sensi-bert-0.5", "dense"),
    }
    for one in made:
        assert (one.n, one.extra["cycle_batches"], one.extra["cycle_sentences"]) == (2, 3, 12)
        assert one.extra["sentences_per_s"] == pytest.approx(4e3 / one.candidate_ms)
        assert one.extra["ratio_p20"] <= one.ratio <= one.extra["ratio_p80"]


def test_what_cannot_run_is_told() -> None:
    said: list[str] = []
    *_, asked = step_cases.grouped_cases(True, None, None)
    assert step.measure(asked, torch.float32, "cpu", said.append, count=False) == []
    assert "skipped: expected squad-dir" in said[-1]
    mpnet = a_case(lambda: step_cases.random_model("mpnet", **SMALL, intermediate_size=48))
    assert step.measure(mpnet, torch.float32, "cpu", said.append, count=False) == []
    assert "dense, sensi-bert-0.5 skipped, so nothing is timed: MPNet" in said[-1]


def test_windows_are_full_and_hold_their_answers(tmp_path: Path) -> None:
    rows = windows(squad(tmp_path), 4, 96)
    assert {len(row.input_ids) for row in rows} == {96}
    the = rows[0].input_ids[7]
    for row in rows:
        assert row.token_type_ids is not None
        start, end = row.label  # type: ignore[misc]
        assert row.token_type_ids[start] == 1
        assert row.input_ids[start] == row.input_ids[end] == the
    with pytest.raises(DataError, match="expected 9 windows of 96 tokens, got"):
        windows(tmp_path, 9, 96)
    with pytest.raises(DataError, match="no-such"):
        windows(tmp_path / "no-such", 1, 96)
    tmp_path.joinpath("train.json").write_text('{"data": [{}]}')
    with pytest.raises(DataError, match=r"expected SQuAD 1\.1's JSON, got KeyError"):
        windows(tmp_path, 1, 96)


def test_question_answering_races(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cases, "WINDOW", 96)
    monkeypatch.setattr(step_cases, "WINDOWS", 2)
    monkeypatch.setattr(step_cases, "QUICK_BATCHES", 2)
    *_, case = step_cases.grouped_cases(True, None, squad(tmp_path))
    assert case.name == "squad-minilm-96-2"
    made = step.measure(case, torch.float32, "cpu", lambda _: None, count=False)
    assert len(made) == 3
    assert {one.tokens for one in made} == {2 * 96}


def test_every_name_of_a_race_is_a_contestant() -> None:
    assert set(step_cases.RACING) <= {*HF, *OURS}
