"""One benchmark suite within a time: ``… bench.suite.bench step --seconds 120 --json FILE``.

Rows are in ``FILE``'s journal as soon as they are measured. When the time is over the suite
stops at its next case, and what was measured is written. A case that fails takes no other down. On
a GPU the most telling cases come first.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from sensikernels.bench import rows, timing

COMPILED = "hf-compiled"
FIRST_SHAPES = ((768, 3072), (3072, 768), (768, 768))


class EnoughError(Exception):
    """The time is over."""


def progress(line: str) -> None:
    """Print what comes next; raise instead once the time is over."""
    if timing.time_is_up():
        raise EnoughError
    print(line, flush=True)


def isolate(module: ModuleType, failures: list[str]) -> None:
    """Let a case that fails leave a line in ``failures``, and the others go on.

    A whole step is tried again without HuggingFace compiled, the contestant most likely to fail.
    """
    original = getattr(module, "measure", None)
    if original is None:
        return

    def measure(case: Any, *words: Any, **named: Any) -> list[rows.Row]:
        try:
            return list(original(case, *words, **named))
        except EnoughError:
            raise
        except Exception as error:  # the other cases go on
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            failures.append(f"{getattr(case, 'name', case)}: {reason}")
            print(f"FAILED {failures[-1]}", flush=True)
        without = getattr(case, "without", (COMPILED,))
        if COMPILED in without:
            return []
        return measure(replace(case, without=(*without, COMPILED)), *words, **named)

    module.measure = measure  # type: ignore[attr-defined]


def telling(cases: Sequence[Any], quick: bool) -> list[Any]:
    """Linears in the order of what they tell: bfloat16, 4,096 tokens, BERT-base's shapes first."""

    def rank(case: Any) -> tuple[bool, bool, int, bool]:
        shape = (case.in_features, case.out_features)
        place = FIRST_SHAPES.index(shape) if shape in FIRST_SHAPES else len(FIRST_SHAPES)
        return str(case.dtype) != "torch.bfloat16", case.tokens != 4096, place, case.density > 0.5

    # A compilation for each case takes longer than all that is measured of it.
    dropped = ("compiled-masked",) if quick else ()
    keep = [replace(c, baselines=tuple(b for b in c.baselines if b not in dropped)) for c in cases]
    return sorted(keep, key=rank)


def reorder(module: ModuleType, device: str, quick: bool) -> None:
    """On a GPU: the whole table of linears, by what it tells, as far as the time goes."""
    found: Any = module
    if device != "cpu" and hasattr(found, "all_cases"):
        table = telling(found.all_cases(device), quick)
        found.all_cases = lambda device: table
        found.quick_cases = lambda: table


def main() -> int:
    """Run the suite; exit code 1 where a case or the suite failed, with the other rows written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("suite")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path)
    given = parser.parse_args()
    # By name: a suite costs its imports only where it is asked for.
    module = import_module(f"sensikernels.bench.{given.suite}")
    failures: list[str] = []
    isolate(module, failures)
    reorder(module, given.device, given.quick)
    knows = inspect.signature(module.run).parameters
    extra: dict[str, Any] = {"data_dir": given.data_dir} if "data_dir" in knows else {}
    journal = given.json.with_suffix(".jsonl")
    rows.keep_journal(journal)
    timing.stop_after(given.seconds)
    try:
        module.run(device=given.device, quick=given.quick, progress=progress, **extra)
    except EnoughError:
        print(f"stopped after {given.seconds:.0f} s")
    finally:
        found = rows.read_journal(journal)
        rows.write_dicts(given.json, found, given.device)
    for one in found:
        print(
            f"{one['case']:<28} {one['dtype']:<9} {one['candidate']:<18} "
            f"{one['candidate_ms']:10.4f} ms  x{one['ratio']:.2f} {one['baseline']}"
        )
    if failures:
        print(f"{len(failures)} cases failed, the first: {failures[0]}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
