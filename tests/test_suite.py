"""The GPU suite's own machinery, on a CPU: limits, failures, summary, filing of results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bench.suite import bars as suite_bars
from bench.suite import bench as suite_bench
from bench.suite import import_results
from bench.suite import outcomes as suite_pytest
from bench.suite import runner as suite
from bench.suite.report import LOGS, PICTURE, RECORD, SUMMARY, Report
from bench.suite.steps import SECONDS, Options, Step, steps
from sensikernels.bench import linear, step

ROOT = Path(__file__).parents[1]
RATES = [
    {"name": suite_bars.CUBE, "value": 790.0, "unit": "TFLOP/s", "spread": 0.01, "n": 9},
    {"name": "copy", "value": 4300.0, "unit": "GB/s", "spread": 0.01, "n": 9},
    {"name": "l2-read-24-mib", "value": 5500.0, "unit": "GB/s", "spread": 0.01, "n": 9},
]
FACTS = {
    "device": "nvidia-test",
    "cpu": "some cpu",
    "threads": 8,
    "python": "3.12.3",
    "dirty": False,
    "commit": "0123456789abcdef",
    "versions": {"torch": "2.11.0"},
    "gpu": {"name": "NVIDIA Test", "driver": "580", "cuda": "13.0"},
}


def python(name: str, code: str, **facts: Any) -> Step:
    return Step(name=name, command=(sys.executable, "-c", code), **facts)


def report(tmp_path: Path, device: str = "cpu") -> Report:
    work = tmp_path / "work"
    work.mkdir()
    return Report(output=tmp_path / "out", work=work, device=device, quick=True)


def row(suite_name: str, **facts: Any) -> dict[str, Any]:
    usual = {
        "suite": suite_name,
        "case": "c",
        "candidate": "x",
        "baseline": "y",
        "pattern": "",
        "density": 1.0,
        "block": "",
        "tokens": 4096,
        "in_features": 768,
        "ratio": 1.0,
        "out_features": 3072,
        "dtype": "bfloat16",
        "direction": "forward",
        "candidate_ms": 1.0,
    }
    return usual | facts


def test_a_step_over_its_limit_ends_with_all_it_started(tmp_path: Path):
    child = "import subprocess, time\nprint(subprocess.Popen(['sleep', '60']).pid)\ntime.sleep(60)"
    start = time.monotonic()
    done = suite.run_step(python("slow", child), tmp_path, 3.0)
    assert done.status == "timed out"
    assert time.monotonic() - start < 10
    pid = int((tmp_path / "slow.log").read_text())
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert done.reason == f"after 3 s, at: {pid}"


def test_a_failing_step_takes_nothing_down(tmp_path: Path):
    out = report(tmp_path)
    todo = [
        python("first", "print('fine')"),
        python("broken", "import sys; print('half way'); sys.exit(3)"),
        Step(name="missing", command=("no-such-program-here",)),
        Step(name="unfit", skip="no such device"),
        python(
            "last",
            f"open({str(tmp_path / 'work' / 'last.json')!r}, 'w').write('[1]')",
            result=tmp_path / "work" / "last.json",
        ),
        python("late", "", needs=1e6),
    ]
    said: list[str] = []
    suite.run_all(todo, out.work, out, time.monotonic() + 100, said.append)
    states = {s["name"]: (s["status"], s["reason"]) for s in out.record["steps"]}
    assert states["first"] == states["last"] == ("ok", "")
    assert states["broken"] == ("failed", "exit 3: half way")
    assert states["missing"][0] == "failed"
    assert states["unfit"] == ("skipped", "no such device")
    assert states["late"][0] == "skipped"
    assert "it needs 1000000 s" in states["late"][1]
    assert out.record["results"] == {"last": [1]}
    assert out.finish() == ["broken", "missing"]
    assert out.files() == [LOGS, RECORD, SUMMARY]
    with tarfile.open(tmp_path / "out" / LOGS) as logs:
        assert set(logs.getnames()) == {"first.log", "broken.log", "missing.log", "last.log"}
    assert "| broken | failed |" in (tmp_path / "out" / SUMMARY).read_text()


def test_a_step_cut_short_by_the_end_of_the_time_has_not_failed(tmp_path: Path):
    out = report(tmp_path)
    slow = python("slow", "import time; time.sleep(60)", limit=50, needs=0)
    suite.run_all([slow], out.work, out, time.monotonic() + suite.RESERVE + 1, lambda _: None)
    (state,) = out.record["steps"]
    assert state["status"] == "skipped"
    assert state["reason"].startswith("cut short: after 1 s")
    assert out.finish() == []


def test_a_step_learns_how_long_it_has(tmp_path: Path):
    timed = python("timed", "import sys; print(sys.argv[1])", limit=50, slack=20)
    timed = Step(**{**vars(timed), "command": (*timed.command, SECONDS)})
    suite.run_step(timed, tmp_path, 50)
    assert (tmp_path / "timed.log").read_text() == "30\n"


def test_rows_of_a_killed_suite_are_kept(tmp_path: Path):
    out = report(tmp_path)
    path = out.work / "linear.json"
    code = (
        "import os, pathlib\n"
        f"pathlib.Path({str(path)!r}).with_suffix('.jsonl')"
        '.write_text(\'{"ratio": 2.0}\\n{"ra\')\n'
        "os.kill(os.getpid(), 9)"
    )
    killed = python("linear", code, suite="linear", result=path)
    suite.run_all([killed], out.work, out, time.monotonic() + 60, lambda _: None)
    assert out.record["steps"][0]["status"] == "failed"
    assert json.loads((tmp_path / "out" / "linear.json").read_text()) == [{"ratio": 2.0}]


def test_paths_of_this_machine_stay_here(tmp_path: Path):
    out = report(tmp_path)
    given = {"a": f"{ROOT}/tests/x.py: no", "b": ["/somewhere/glue"], "c": f"in {out.work}"}
    assert out._clean(given) == {"a": "tests/x.py: no", "b": ["glue"], "c": "in ."}


def test_the_steps_of_each_device(tmp_path: Path):
    for device in ("cpu", "cuda"):
        options = Options(device=device, quick=True, work=tmp_path)
        names = [one.name for one in steps(options)]
        assert len(set(names)) == len(names)
        assert names.index("record") < names.index("ceilings") < names.index("step")
        assert names.index("step") < names.index("linear") < names.index("tune")
        shown = {s.suite for s in steps(options)} - {""}
        assert len(shown | {RECORD, SUMMARY, PICTURE, LOGS}) <= 8
    dry = [s for s in steps(Options(device="cpu", quick=True, work=tmp_path)) if not s.skip]
    assert {"linear", "step", "tests", "build", "tune"} <= {s.name for s in dry}


def test_the_roof_of_a_step():
    """The 3.7 to 4.0 ms that were derived for an H200's published rates."""
    known = suite_bars.rates(RATES)
    assert 3.6 < (suite_bars.step_ceiling_ms({}, known) or 0) < 4.0
    blocks = suite_bars.blocks_ceiling({"block": "64x64"}, known)
    assert blocks == pytest.approx(234.7, abs=0.1)
    assert suite_bars.step_ceiling_ms({}, {}) is None


def test_the_worst_row_decides():
    bar = suite_bars.Bar(
        what="w", suite="s", where={"tokens": lambda n: n > 1, "case": ("a", "b")}, at_least=1.0
    )
    rows = [row("s", case=c, ratio=r) for c, r in (("a", 1.5), ("b", 1.1), ("c", 0.1))]
    verdict = suite_bars.judge(bar, rows, {})
    assert verdict is not None
    assert (verdict.measured, verdict.held, verdict.rows) == (1.1, True, 2)
    cold = [*rows, row("s", case="a", ratio=0.5, l2="cold")]
    assert suite_bars.judge(bar, cold, {}) == verdict
    worse = suite_bars.judge(bar, [*rows, row("s", case="a", ratio=0.9)], {})
    assert worse is not None
    assert not worse.held
    assert suite_bars.judge(bar, [], {}) is None


def test_every_bar_can_be_shown():
    for device in ("cpu", "cuda"):
        lines = suite_bars.table(device, {}, {})
        assert len(lines) == 2 + len(suite_bars.of_device(device))
        assert all(suite_bars.NOT_YET in line for line in lines[2:])
    for bar in suite_bars.BARS:
        assert (bar.at_least is None) != (bar.at_most is None)


def write_run(folder: Path, **facts: Any) -> Path:
    """An output folder as the suite leaves it."""
    folder.mkdir()
    results = {
        "record": {"provenance": FACTS | facts},
        "ceilings": RATES,
        "tune": {"dispatch": {"device": "nvidia-test", "break_even": []}},
    }
    record = {"kind": "cuda", "quick": True, "started": "", "steps": [], "results": results}
    (folder / RECORD).write_text(json.dumps(record))
    blocks = row("linear", candidate="block-sparse", block="64x64", density=0.25, gflops=200e3)
    (folder / "linear.json").write_text(json.dumps([blocks]))
    (folder / "step.json").write_text("[]")
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    (root / "bench" / "results").mkdir(parents=True)
    (root / "README.md").write_text("a\n<!-- results:gpu -->\nold\n<!-- /results:gpu -->\nb\n")
    marks = "<!-- results:ceilings -->\n<!-- /results:ceilings -->\n"
    (root / "ARCHITECTURE.md").write_text(marks)
    return root


def test_results_are_filed_and_shown_once(tmp_path: Path, repository: Path):
    run = write_run(tmp_path / "run")
    for _ in range(2):
        written = import_results.bring_in(run, repository)
        assert [str(p.relative_to(repository)) for p in written] == [
            "bench/results/nvidia-test/linear.json",
            "bench/results/nvidia-test/linear.provenance.json",
            f"bench/results/nvidia-test/{RECORD}",
            "sensikernels/dispatch/nvidia-test.json",
        ]
        import_results.refresh(repository)
    assert import_results.refresh(repository) == []
    readme = (repository / "README.md").read_text()
    assert readme.startswith("a\n<!-- results:gpu -->\nNVIDIA Test, driver 580")
    assert readme.endswith("<!-- /results:gpu -->\nb\n")
    assert "| 64 × 64 blocks, forward | 200 TFLOP/s | 234.7 TFLOP/s | 0.85 |" in readme
    assert f"| unit budget | {suite_bars.NOT_YET} |" in readme
    assert "| copy | 4300 GB/s | 1% |" in (repository / "ARCHITECTURE.md").read_text()


def test_a_later_run_of_some_steps_keeps_the_others(tmp_path: Path, repository: Path):
    import_results.bring_in(write_run(tmp_path / "run"), repository)
    later = write_run(tmp_path / "later")
    record = json.loads((later / RECORD).read_text())
    record["results"] = {"record": record["results"]["record"], "tests": {"passed": 3}}
    (later / RECORD).write_text(json.dumps(record))
    import_results.bring_in(later, repository)
    (device,) = import_results.filed(repository / "bench" / "results").values()
    assert set(device["record"]["results"]) == {"record", "ceilings", "tune", "tests"}


def test_without_results_the_tables_say_so(repository: Path):
    import_results.refresh(repository)
    for name in import_results.DOCUMENTS:
        assert suite_bars.NOT_YET in (repository / name).read_text()


@pytest.mark.parametrize("dirty", [True, None])
def test_a_changed_tree_is_refused(dirty: bool | None, tmp_path: Path, repository: Path):
    run = write_run(tmp_path / "run", dirty=dirty)
    with pytest.raises(SystemExit, match="expected results of a clean commit"):
        import_results.bring_in(run, repository)
    assert not list((repository / "bench" / "results").iterdir())
    assert import_results.bring_in(run, repository, allow_dirty=True)


def test_a_folder_of_something_else_is_refused(tmp_path: Path, repository: Path):
    with pytest.raises(SystemExit, match="expected an output folder"):
        import_results.bring_in(tmp_path, repository)


def test_the_documents_show_what_is_filed():
    devices = import_results.filed(ROOT / "bench" / "results")
    for name, table in (("README.md", "gpu"), ("ARCHITECTURE.md", "ceilings")):
        text = (ROOT / name).read_text()
        assert f"<!-- results:{table} -->" in text
        assert import_results.rewrite(text, devices) == text


def test_a_case_that_fails_takes_no_other_down():
    module = ModuleType("made")
    module.measure = lambda case, most: [case] if case < most else 1 / 0  # type: ignore[attr-defined]
    failures: list[str] = []
    suite_bench.isolate(module, failures)
    assert [module.measure(case, 1) for case in (0, 1, 0)] == [[0], [], [0]]
    assert failures == ["1: division by zero"]


@dataclass(frozen=True)
class Compiled:
    without: tuple[str, ...] = ()


def test_a_step_is_tried_again_without_the_compiler():
    module = ModuleType("made")
    module.measure = lambda case: [case] if case.without else 1 / 0  # type: ignore[attr-defined]
    failures: list[str] = []
    suite_bench.isolate(module, failures)
    assert module.measure(Compiled()) == [Compiled(without=("hf-compiled",))]
    assert len(failures) == 1


def test_a_gpu_sees_the_telling_cases_first():
    table = suite_bench.telling(linear.all_cases("cuda"), quick=True)
    head = table[:60]
    assert {(c.tokens, str(c.dtype), c.in_features) for c in head} == {
        (4096, "torch.bfloat16", 768)
    }
    assert {c.pattern for c in head} == {"rows", "columns", "heads", "blocks"}
    assert {c.direction for c in head} == {"forward", "forward+backward", "grad_weight"}
    assert len(table) == len(linear.all_cases("cuda"))
    assert step.cases(True, "cuda", None)[0].name == "bert-base-32x128"


def test_a_journal_of_tests(tmp_path: Path):
    path = tmp_path / "tests.jsonl"
    lines = [
        {"test": f"t{i}", "outcome": o, "why": "w", "seconds": i}
        for i, o in enumerate(("passed", "failed", "skipped", "passed"))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    found = suite_pytest.summary(path)
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 1, 1)
    assert found["failures"][0]["test"] == "t1"
    assert found["slowest"][0]["test"] == "t3"
    assert suite_pytest.summary(tmp_path / "none")["passed"] == 0


def test_the_script_runs_from_anywhere(tmp_path: Path):
    command = ["bash", str(ROOT / "bench" / "gpu_suite.sh"), "--list", "--device", "cpu", "--quick"]
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("record")
    assert not list(tmp_path.iterdir())
