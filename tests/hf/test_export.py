"""Checkpoints that load without this package, and Auto classes that know compact ones."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sensikernels._core.errors import SensiError, UsageError
from sensikernels.hf import apply, compact, export, modeling_compact, restore
from sensikernels.hf import export as module_export
from tests.hf.conftest import make_batch, make_model
from tests.hf.test_module_state import FIRST, plans
from tests.hf.test_swap import make_plan, outputs

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("granularity", ["heads", "dimensions"])
@pytest.mark.parametrize("source", ["applied", "masked", "compact", "compact, trimmed again"])
def test_stock_is_of_full_size_and_computes_the_same(
    granularity: str, source: str, tmp_path: Path
) -> None:
    model, batch = make_model().eval(), make_batch()
    made = make_plan(model, granularity=granularity)
    apply(model, made, form="masked" if source == "masked" else "compact")
    given = compact(model) if source.startswith("compact") else model
    if source.endswith("again"):
        again = make_plan(given, granularity="dimensions")
        apply(given, again)
    wanted = outputs(given, batch)[1]
    stock = export(given, tmp_path / "stock")
    assert type(stock) is transformers.BertForSequenceClassification
    restore(model)
    assert {n: p.shape for n, p in stock.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    got = outputs(stock, batch)[1]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    if source == "masked":
        assert torch.equal(got, wanted)
    if not source.startswith("compact"):
        kept = made.weight_masks[FIRST].dense()
        assert not stock.get_parameter(f"{FIRST}.weight")[~kept].any()
    if source == "applied":
        x = torch.arange(1, 10)[None]
        wanted = stock(x).logits.detach().double().flatten().tolist()
        assert without_us(tmp_path / "stock") == wanted


LOGITS = "model(torch.arange(1, 10)[None]).logits.detach().double().flatten().tolist()"


def without_us(folder: Path) -> list[float]:
    """Logits of tokens 1 to 9 by a process that has nothing of this package."""
    code = (
        "import sys, torch, transformers\n"
        "auto = transformers.AutoModelForSequenceClassification\n"
        f"model = auto.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()\n"
        f"print({LOGITS})\n"
        f"model.save_pretrained({str(folder / 'again')!r})\n"
        "assert not [n for n in sys.modules if n.startswith('sensikernels')]"
    )
    logits: list[float] = json.loads(run(code, folder).stdout)
    return logits


def test_a_compact_checkpoint_brings_its_own_code(tmp_path: Path) -> None:
    """Alone, saved again by it, and where this package is imported only once it has run."""
    model = make_model().eval()
    apply(model, make_plan(model, granularity="dimensions"))
    small = export(model, tmp_path / "small", form="compact")
    logits = small(torch.arange(1, 10)[None]).logits.detach().double().flatten().tolist()
    assert without_us(tmp_path / "small") == logits
    auto = transformers.AutoModelForSequenceClassification
    back = auto.from_pretrained(tmp_path / "small" / "again", trust_remote_code=True)
    assert type(back) is type(small)
    assert torch.equal(outputs(back, make_batch())[1], outputs(small, make_batch())[1])
    code = (
        "import torch, transformers\n"
        "auto = transformers.AutoModelForSequenceClassification\n"
        f"folder = {str(tmp_path / 'small')!r}\n"
        "model = auto.from_pretrained(folder, trust_remote_code=True).eval()\n"
        "from sensikernels.hf import apply, compact, export, structure_of\n"
        "from sensikernels.masks import uniform\n"
        "kind, all_units = type(model), uniform(structure_of(model, 'dimensions'), {})\n"
        "apply(model, all_units, features=('packed',))\n"
        "model = compact(model)\n"
        "assert type(model) is not kind and type(model).stock_class is kind.stock_class\n"
        "assert type(export(model)) is transformers.BertForSequenceClassification\n"
        f"print({LOGITS})"
    )
    assert json.loads(run(code).stdout) == logits


def test_every_class_is_found_by_its_name(tmp_path: Path) -> None:
    for name in ("SkBertConfig", "SkBertModel", "SkBertForQuestionAnswering"):
        made = getattr(modeling_compact, name)
        assert made.__name__ == name
        assert pickle.loads(pickle.dumps(made)) is made
    for name in ("BertModel", "SkBertNothing", "SkBertTokenizer", "__path__"):
        with pytest.raises(AttributeError, match=name):
            getattr(modeling_compact, name)
    model = make_model().eval()
    apply(model, make_plan(model, granularity="dimensions"))
    small, batch = compact(model), make_batch()
    twin = pickle.loads(pickle.dumps(small))
    assert torch.equal(outputs(twin, batch)[1], outputs(small, batch)[1])


def run(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """``code`` in a Python process of its own, in ``folder``."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_other_plans() -> None:
    model, batch = make_model().eval(), make_batch()
    apply(model, plans(model)["blocks"])
    got, wanted = outputs(export(model), batch)[1], outputs(model, batch)[1]
    torch.testing.assert_close(got, wanted)


class OwnHead(transformers.BertForSequenceClassification):  # type: ignore[misc]
    """A class that transformers does not have."""


def test_a_class_of_ones_own_is_exported_but_not_compacted() -> None:
    model, batch = OwnHead(make_model().config).eval(), make_batch()
    apply(model, make_plan(model))
    with pytest.raises(UsageError, match="transformers' own class of BERT, .*, got OwnHead"):
        compact(model)
    stock = export(model)
    assert type(stock) is OwnHead
    torch.testing.assert_close(stock(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    with pytest.raises(UsageError, match="expected a plan applied or a compact model"):
        export(model)
    with pytest.raises(UsageError, match="form: expected one of compact, stock"):
        export(model, form="onnx")
    apply(model, make_plan(model))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="path: expected a new or empty folder"):
        export(model, tmp_path / "full")
    small = export(model, tmp_path / "compact", form="compact")
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "compact")
    assert type(back) is type(small)

    def scratched(self: object, folder: Path) -> None:
        real(self, folder)
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")

    real = transformers.PreTrainedModel.save_pretrained
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", scratched)
    with pytest.raises(SensiError, match="what was read back is not what was written"):
        export(model, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    assert module_export is export


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compact")
    model = make_model()
    apply(model, make_plan(model))
    compact(model).save_pretrained(folder)
    return folder


AUTO = "from transformers import AutoConfig, AutoModelForSequenceClassification"
ORDERS = {
    "before": ("import sensikernels", AUTO),
    "after": (AUTO, "import sensikernels"),
    "config alone": (
        "import sensikernels",
        "from transformers import AutoConfig",
        "AutoConfig.from_pretrained(FOLDER)",
        AUTO,
    ),
    "another model first": (
        "import sensikernels",
        "from transformers import DistilBertModel",
        AUTO,
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_know_compact_models(order: str, checkpoint: Path) -> None:
    """Without code of the folder: its copy of the classes would fail loudly."""
    (checkpoint / "modeling_compact.py").write_text("raise SystemExit('code of the folder ran')")
    code = (
        f"FOLDER = {str(checkpoint)!r}\n{'; '.join(ORDERS[order])}\n"
        "model = AutoModelForSequenceClassification.from_pretrained(FOLDER)\n"
        "print(type(model).__module__, type(AutoConfig.from_pretrained(FOLDER)).__module__)"
    )
    done = run(code)
    assert done.stdout.split() == ["sensikernels.hf.modeling_compact"] * 2
    assert "trust_remote_code" not in done.stdout + done.stderr


def test_nothing_of_the_finder_stays() -> None:
    code = (
        "import sys, inspect, sensikernels; from transformers import AutoModel, BertModel\n"
        "assert not any('sensikernels' in type(f).__module__ for f in sys.meta_path)\n"
        "loaders = {type(m.__loader__).__module__ for n, m in sys.modules.items() "
        "if n.startswith('transformers.') and getattr(m, '__loader__', None)}\n"
        "assert not any('sensikernels' in name for name in loaders), loaders\n"
        "assert 'class BertModel' in inspect.getsource(BertModel)"
    )
    run(code)
