"""A comparison of tiny runs: which runs are made, what is chosen, and what is said of them."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensikernels._core.errors import CheckpointError, UsageError
from sensikernels.compare import compare, lines, runs
from sensikernels.compare.picture import frontier
from sensikernels.training import Settings, finetune
from tests.training.conftest import tiny  # noqa: F401

METHODS = ["dense", "hf", "sensi-bert@0.6/2", "bitfit"]
FACTORS = (1.0, 40.0)


@pytest.fixture
def common(tiny: Path, tmp_path: Path) -> Settings:  # noqa: F811
    return Settings(
        task="demo",
        model=str(tiny),
        method="dense",
        output=tmp_path / "out",
        max_train_samples=96,
        batch_size=16,
        ranking_rows=32,
        device="cpu",
        eval_steps=3,
    )


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The runs that are made, here instead of each in a process of its own."""
    seen: list[Settings] = []

    def here(settings: Settings) -> Any:
        seen.append(settings)
        return finetune(settings)

    monkeypatch.setattr(runs, "_in_a_process", here)
    return seen


def again(common: Settings, **named: Any) -> dict[str, Any]:
    asked = {"seeds": 2, "factors": FACTORS, "held_out": 64, **named}
    return compare(common, METHODS, **asked)


def test_runs_choice_table_and_picture(common: Settings, made: list[Settings]) -> None:
    said: list[str] = []
    content = again(common, progress=said.append)
    assert len(made) == 3 * (2 + 2)  # three runs serve four contestants
    choosing, final = made[:6], made[6:]
    assert all(run.held_out == 64 and run.seed == 0 for run in choosing)
    assert all(run.held_out is None for run in final)
    assert [run.seed for run in final] == [0, 0, 0, 1, 1, 1]

    known = content["contestants"]
    assert json.loads((common.output / "compare.json").read_text()) == json.loads(
        json.dumps(content)
    )
    for name, one in known.items():
        best = max(one["grid"].values())
        chosen = f"{one['learning_rate']:g}"
        assert one["grid"][chosen] == best
        assert chosen == min((r for r, v in one["grid"].items() if v == best), key=float), name
        assert len(one["runs"]) == 2
    rates = {name: sorted(map(float, one["grid"])) for name, one in known.items()}
    assert rates["hf"] == rates["dense"] == [5e-5, 2e-3]
    assert rates["bitfit"] == [1e-3, 4e-2]

    table = {line["contestant"]: line for line in lines(known)}
    points = [100 * run["value"] for run in known["sensi-bert@0.6/2"]["runs"]]
    line = table["sensi-bert@0.6/2"]
    assert line["mean"] == pytest.approx(statistics.fmean(points))
    assert line["deviation"] == pytest.approx(statistics.stdev(points))
    assert line["flops_ratio"] <= 0.6
    assert line["parameters_kept"] < table["dense"]["parameters_kept"]
    assert table["bitfit"]["parameters_trained"] < table["dense"]["parameters_trained"] / 5
    assert table["hf"]["parameters_kept"] is None
    assert 0 < table["dense"]["to_dense"] <= 1
    for name in ("dense", "sensi-bert@0.6/2", "bitfit"):
        assert table[name]["latency_ms"]["1"] > 0
        assert table[name]["latency_ms"]["32"] > 0
    for one in known.values():
        for run in one["runs"]:
            seconds = [point[0] for point in run["curve"]]
            assert seconds == sorted(seconds)
            assert seconds[-1] == pytest.approx(run["seconds"], rel=0.05)
            assert run["curve"][-1][1] == run["value"]
    assert (common.output / "compare.png").read_bytes().startswith(b"\x89PNG")
    models = sorted(p.parent.name for p in common.output.glob("*/*/model"))
    assert models == ["bitfit seed 0", "dense seed 0", "sensi-bert@0.6 epochs 2 seed 0"]
    assert said[0] == "1 of 12: dense x1"
    assert said[-1] == "latency of the models"


def test_rates_that_are_given_and_one_seed(common: Settings, made: list[Settings]) -> None:
    content = compare(
        common,
        ["dense:lr=1e-3", "bitfit"],
        once=["freeze:share=0.5"],
        seeds=2,
        factors=(1.0, 2.0),
        held_out=64,
    )
    known = content["contestants"]
    counts = {name: (len(one["grid"]), len(one["runs"])) for name, one in known.items()}
    assert counts == {"dense:lr=1e-3": (0, 2), "bitfit": (2, 2), "freeze:share=0.5": (2, 1)}
    assert known["dense:lr=1e-3"]["learning_rate"] == 1e-3
    assert [run.lr for run in made if run.method == "dense"] == [1e-3, 1e-3]
    assert {line["contestant"]: line["deviation"] for line in lines(known)}[
        "freeze:share=0.5"
    ] is None


def test_what_is_done_is_not_done_again(
    common: Settings, made: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = again(common, factors=(1.0,), seeds=1)
    assert [one["grid"] for one in first["contestants"].values()] == [{}] * 4
    lost = common.output / "runs" / "bitfit seed 0"
    shutil.rmtree(lost)
    fresh: list[str] = []
    monkeypatch.setattr(
        "sensikernels.training.loop.prepare", _noting(fresh, "sensikernels.training.loop")
    )
    second = again(common, factors=(1.0,), seeds=1)
    assert fresh == ["bitfit seed 0"]
    for name, one in first["contestants"].items():
        values = [run["value"] for run in second["contestants"][name]["runs"]]
        assert values == [run["value"] for run in one["runs"]]


def _noting(names: list[str], home: str) -> Callable[..., Any]:
    from importlib import import_module

    prepare = import_module(home).prepare

    def noted(settings: Settings, given: Any = None) -> Any:
        names.append(settings.output.name)
        return prepare(settings, given)

    return noted


def test_a_run_in_a_process_of_its_own(common: Settings) -> None:
    content = compare(common, ["dense"], seeds=1, factors=(1.0,))
    assert len(content["contestants"]["dense"]["runs"]) == 1
    assert len(list(common.output.glob("runs/*/report.json"))) == 1


def test_other_settings_in_the_same_folder_are_refused(
    common: Settings, made: list[Settings]
) -> None:
    compare(common, ["dense"], seeds=1, factors=(1.0,))
    with pytest.raises(CheckpointError, match="lr: expected 5e-05 as in the finished run"):
        compare(common, ["dense"], seeds=1, factors=(2.0,))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"seeds": 0}, "^seeds: expected at least 1, got 0"),
        ({"factors": ()}, r"^rate_factors: expected numbers above 0, got \[\]"),
        ({"factors": (0.5, -1.0)}, r"^rate_factors: expected numbers above 0"),
        ({"held_out": 0}, "^held_out: expected at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused_before_a_run(
    common: Settings, made: list[Settings], named: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        again(common, **named)
    assert made == []
    assert not common.output.exists()


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_frontier_is_what_no_other_beats(points: list[tuple[int, int]]) -> None:
    found = frontier([(float(s), float(m)) for s, m in points])
    ends = [points[i] for i in found]
    beaten = {p for p in points if any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)}
    assert set(ends) == set(points) - beaten
    assert len(set(ends)) == len(ends)
    assert ends == sorted(ends)
