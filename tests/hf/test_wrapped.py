"""Encoders inside what users put around them: PEFT's adapters, a SentenceTransformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sensikernels._core.errors import UsageError
from sensikernels.data import embedded_model_path
from sensikernels.hf import apply, compact, export, restore, sensitivity, use_packed
from sensikernels.masks import Budget, Plan, plan
from tests.hf.families import draw, make
from tests.hf.packed_cases import SMALL

transformers = pytest.importorskip("transformers")
STEP = ("dropout", "words", "packed", "cls", "fused")
SENTENCES = ["a film", "the plot was good, really, and so was the cast", "no"]


_ADAPTED = ("query", "value", "q_lin", "v_lin", "Wqkv", "mlp.Wo")


def with_adapters(model: nn.Module) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    named = {"r": 4, "lora_dropout": 0.0, "init_lora_weights": False}
    linears = [name for name, _ in model.named_modules() if name.endswith(_ADAPTED)]
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=linears, **named)
    return peft.get_peft_model(model, config)


def planned(model: nn.Module, **named: Any) -> Plan:
    scores = sensitivity(model, [], "magnitude")
    return plan(scores, Budget(flops=0.7), multiples=SMALL, minimums=SMALL, **named)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert", "modernbert"])
def test_adapters_take_the_fast_step(kind: str) -> None:
    head, batch = "ForSequenceClassification", draw("ForSequenceClassification", kind)
    one, other = with_adapters(make(kind, head)), with_adapters(make(kind, head))
    report = apply(other, features=STEP)
    assert "last layer on first tokens" in report
    wanted, got = one(**batch), other(**batch)
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    wanted.loss.backward()
    got.loss.backward()
    trained = {name: p for name, p in one.named_parameters() if p.requires_grad}
    assert any("lora_" in name for name in trained)
    for name, parameter in trained.items():
        mine = other.get_parameter(name).grad
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
    restore(other)
    torch.testing.assert_close(other(**batch).logits, wanted.logits)


def test_adapters_sit_on_a_trimmed_model_and_trim_no_adapted_linear() -> None:
    head, batch = "ForSequenceClassification", draw("ForSequenceClassification")
    model = make("bert", head)
    apply(model, planned(model))
    small = compact(model)
    wanted = small(**batch).loss
    adapted = with_adapters(small)
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(**batch).loss, wanted)
    apply(adapted, features=STEP)
    adapted(**batch).loss.backward()
    restore(adapted)
    bare = with_adapters(make("bert", head))
    before = list(bare.state_dict())
    with pytest.raises(UsageError, match="expected an nn.Linear, got a peft"):
        apply(bare, planned(bare))
    assert list(bare.state_dict()) == before


def test_a_sentence_transformer_around_a_family_without_token_types(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded_model_path())
    words = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    make("modernbert", "Model", **words).save_pretrained(tmp_path / "in")  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path / "in")
    model = library.SentenceTransformer(str(tmp_path / "in"), device="cpu")
    wanted = encoded(model)
    apply(model, features=STEP)
    np.testing.assert_allclose(encoded(model), wanted, atol=1e-5)
    restore(model)
    apply(model, planned(model), features=STEP)
    wanted = encoded(model)
    small = compact(model)
    np.testing.assert_allclose(encoded(small), wanted, atol=1e-5)
    small.save(str(tmp_path / "small"))  # type: ignore[operator]
    back = library.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    np.testing.assert_allclose(encoded(back), wanted, atol=1e-5)


@pytest.fixture
def sentences() -> Any:
    library = pytest.importorskip("sentence_transformers")
    return library.SentenceTransformer(str(embedded_model_path()), device="cpu")


def encoded(model: Any) -> Any:
    return model.encode(SENTENCES, normalize_embeddings=True)


def test_a_sentence_transformer_takes_the_fast_step(sentences: Any) -> None:
    wanted = encoded(sentences)
    apply(sentences, features=("dropout", "words", "packed", "fused"))
    np.testing.assert_allclose(encoded(sentences), wanted, atol=1e-5)
    restore(sentences)
    assert np.array_equal(encoded(sentences), wanted)


def test_a_sentence_transformer_is_trimmed_saved_and_loaded(sentences: Any, tmp_path: Path) -> None:
    import sentence_transformers

    dense = sum(p.numel() for p in sentences.parameters())
    scores = sensitivity(sentences, [], "magnitude")
    apply(sentences, plan(scores, Budget(flops=0.5)), features=("packed", "fused"))
    wanted = encoded(sentences)
    small = compact(sentences)
    assert type(small) is type(sentences)
    assert sum(p.numel() for p in small.parameters()) < 0.8 * dense
    np.testing.assert_allclose(encoded(small), wanted, atol=1e-5)
    small.save(str(tmp_path / "small"))  # type: ignore[operator]
    back = sentence_transformers.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    np.testing.assert_allclose(encoded(back), wanted, atol=1e-5)
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in back.state_dict().items())
    stock = export(sentences)
    np.testing.assert_allclose(encoded(stock), wanted, atol=1e-4)
    with pytest.raises(UsageError, match="path: expected none for a wrapped model"):
        export(sentences, tmp_path / "stock")
    use_packed(back)
    np.testing.assert_allclose(encoded(back), wanted, atol=1e-5)


def test_two_encoders_in_one_model_are_refused() -> None:
    pair = nn.ModuleList([make("bert", "Model"), make("roberta", "Model")])
    with pytest.raises(UsageError, match="model: expected one encoder, got 2 in ModuleList"):
        use_packed(pair)
    with pytest.raises(UsageError, match="model: expected one encoder, got 2 in ModuleList"):
        sensitivity(pair, [], "magnitude")
    with pytest.raises(UsageError, match="model: expected a transformers model, or one inside"):
        compact_of_nothing()


def compact_of_nothing() -> None:
    from sensikernels.hf.inner import transformer_in

    transformer_in(nn.Linear(2, 2))
