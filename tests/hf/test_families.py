"""Families of encoders: each is one value, recognised by its attention, and copied by name."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from sensikernels.hf import (
    apply,
    below_layers,
    compact,
    family_of,
    head_linears,
    is_norm,
    packing_of,
    use_packed,
)
from sensikernels.hf.families import FAMILIES, family_named
from sensikernels.hf.families.bert import BERT
from sensikernels.hf.layers import encoder_layers
from tests.hf.conftest import make_batch, make_model
from tests.hf.test_attention import like_bert
from tests.hf.test_swap import make_plan

transformers = pytest.importorskip("transformers")


def test_names_are_unique_and_found() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert all(family_named(family.name) is family for family in FAMILIES)
    with pytest.raises(KeyError):
        family_named("unknown")


def test_a_family_stays_itself_in_copies_and_pickles() -> None:
    assert copy.deepcopy(BERT) is copy.copy(BERT) is BERT
    assert pickle.loads(pickle.dumps(BERT)) is BERT
    model = make_model()
    use_packed(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert packing_of(twin).family is BERT


def test_every_name_of_bert_is_in_a_bert() -> None:
    model = make_model()
    assert family_of(model) is BERT
    for layer in encoder_layers(model):
        linears = [layer.linear(role) for role in BERT.linears]
        norms = [layer.module.get_submodule(path) for path in BERT.norms.values()]
        assert {type(m) for m in linears} == {nn.Linear}
        assert {type(m) for m in norms} == {nn.LayerNorm}
        assert layer.attention is layer.module.attention.self
    assert below_layers(model) == ("bert.embeddings",)
    assert below_layers(model.bert) == ("embeddings",)  # type: ignore[arg-type]
    assert head_linears(model) == ("bert.pooler.dense", "classifier")


def test_names_of_norms_are_those_of_the_modules() -> None:
    model = make_model()
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    for name, _ in model.named_parameters():
        assert is_norm(name) == (name.rpartition(".")[0] in norms)


def test_relatives_have_berts_layers() -> None:
    model = like_bert("CamembertForSequenceClassification")
    assert family_of(model).linears == BERT.linears
    assert family_of(model).title == "CamemBERT"


def test_a_checkpoint_that_names_no_parts_loads(tmp_path: Path) -> None:
    model, batch = make_model().eval(), make_batch()
    apply(model, make_plan(model, granularity="dimensions"))
    small = compact(model)
    small.save_pretrained(tmp_path)
    (tmp_path / "modeling_compact.py").rename(tmp_path / "modeling.py")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("parts") == BERT.parts()
    config["auto_map"] = {k: v.replace("_compact.", ".") for k, v in config["auto_map"].items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for trusted in (False, True):
        back = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path, trust_remote_code=trusted
        ).eval()
        torch.testing.assert_close(back(**batch).logits, small(**batch).logits)
        assert family_of(back) is BERT


def test_parts_go_through_json_as_they_are() -> None:
    for family in FAMILIES:
        assert json.loads(json.dumps(family.parts())) == family.parts()
