"""Our attention stands in for HuggingFace's where it is exact, and is refused elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sensikernels._core.errors import UsageError
from sensikernels.hf import (
    apply,
    compact,
    encoder_layers,
    measured_flops,
    restore,
    sensitivity,
    structure_of,
)
from sensikernels.masks import Budget, plan
from tests.hf.conftest import make_batch, make_model
from tests.hf.packed_cases import SMALL
from tests.hf.test_module_state import snapshot

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}
LIKE_BERT = {
    "BertForSequenceClassification": "BertConfig",
    "RobertaForSequenceClassification": "RobertaConfig",
    "XLMRobertaForSequenceClassification": "XLMRobertaConfig",
    "CamembertForSequenceClassification": "CamembertConfig",
    "ElectraForSequenceClassification": "ElectraConfig",
}
OTHERS: dict[str, dict[str, Any]] = {
    "GPT2Model": {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 99},
    "LlamaModel": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 99,
    },
    "BartModel": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "vocab_size": 99,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    },
    "T5Model": {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 32, "vocab_size": 99},
    "AlbertModel": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "embedding_size": 16,
        "vocab_size": 99,
    },
    "RobertaPreLayerNormModel": SIZES,
}


def like_bert(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, LIKE_BERT[name])(**SIZES)
    model: nn.Module = getattr(transformers, name)(config)
    return model.eval()


def decoder(**named: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**SIZES, **named}, is_decoder=True)
    model: nn.Module = transformers.BertLMHeadModel(config)
    return model.eval()


def other(name: str) -> nn.Module:
    config = getattr(transformers, name.replace("Model", "Config"))(**OTHERS[name])
    model: nn.Module = getattr(transformers, name)(config)
    return model


@pytest.mark.parametrize("name", LIKE_BERT)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_models_like_bert_compute_the_same_and_trim(name: str, implementation: str) -> None:
    model = like_bert(name)
    model.set_attn_implementation(implementation)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 99, (4, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1], [7]])).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0])}
    wanted = model(**batch).logits
    apply(model, features=("dropout",))
    torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-4, atol=1e-5)
    made = plan(sensitivity(model, [batch]), Budget(flops=0.6), multiples=SMALL, minimums=SMALL)
    restore(model)
    twin = copy.deepcopy(model)
    apply(model, made)
    apply(twin, made, form="masked")
    torch.testing.assert_close(model(**batch).logits, twin(**batch).logits, rtol=1e-4, atol=1e-5)
    assert measured_flops(made, model, batch).ratio == pytest.approx(made.flops_ratio, rel=0.02)


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_model_is_refused_by_name(name: str) -> None:
    model = other(name)
    before = snapshot(model)
    for call in (
        lambda: apply(model, features=("dropout",)),
        lambda: apply(model, features=("packed",)),
        lambda: structure_of(model),
        lambda: sensitivity(model, [], "magnitude"),
    ):
        with pytest.raises(UsageError, match="^model: expected"):
            call()
    assert snapshot(model) == before


@pytest.mark.parametrize("shape", ["no mask", "ones", "padded", "float", "4-d"])
def test_a_decoder_keeps_its_order(shape: str) -> None:
    model = decoder()
    ids = torch.randint(5, 99, (2, 7), generator=torch.Generator().manual_seed(1))
    seen = (torch.arange(7) < torch.tensor([[7], [5]])).long()
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    added = torch.zeros(2, 1, 7, 7).masked_fill(later, torch.finfo(torch.float32).min)
    mask = {
        "no mask": None,
        "ones": torch.ones_like(ids),
        "padded": seen,
        "float": seen.float(),
        "4-d": added,
    }[shape]
    wanted = model(ids, attention_mask=mask, use_cache=False).logits
    apply(model, features=("dropout",))
    got = model(ids, attention_mask=mask, use_cache=False).logits
    where = seen.bool() if shape in ("padded", "float") else torch.ones_like(seen).bool()
    torch.testing.assert_close(got[where], wanted[where], rtol=1e-4, atol=1e-5)
    other_ids = ids.clone()
    other_ids[:, -1] += 1
    changed = model(other_ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(changed[:, :4], got[:, :4])


def test_a_decoder_with_a_cache_and_one_with_cross_attention() -> None:
    model = decoder()
    ids = torch.randint(5, 99, (2, 7), generator=torch.Generator().manual_seed(1))
    wanted = model(ids, use_cache=False).logits
    apply(model, features=("dropout",))
    first = model(ids[:, :4], use_cache=True)
    rest = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, wanted[:, 4:], rtol=1e-4, atol=1e-5)
    crossed = decoder(add_cross_attention=True)
    states = torch.randn(2, 5, 32)
    wanted = crossed(ids, encoder_hidden_states=states, use_cache=False).logits
    apply(crossed, features=("dropout",))
    got = crossed(ids, encoder_hidden_states=states, use_cache=False).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_decoder_is_not_ranked_trimmed_packed_or_compacted() -> None:
    model = decoder()
    batch = {
        "input_ids": torch.ones(2, 5, dtype=torch.long),
        "labels": torch.ones(2, 5, dtype=torch.long),
    }
    made = plan(
        sensitivity(make_model(vocab_size=99), [], "magnitude"),
        Budget(flops=0.7),
        multiples=SMALL,
        minimums=SMALL,
    )
    before = snapshot(model)
    for call in (
        lambda: sensitivity(model, [batch]),
        lambda: structure_of(model),
        lambda: apply(model, made),
        lambda: apply(model, features=("packed",)),
    ):
        with pytest.raises(UsageError, match=r"expected an encoder, got a decoder|model: expected"):
            call()
    assert snapshot(model) == before


def test_an_own_attention_is_refused() -> None:
    class Relative(transformers.models.bert.modeling_bert.BertSelfAttention):
        def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
            return hidden_states, None

    model = make_model()
    model.get_submodule("bert.encoder.layer.1.attention.self").__class__ = Relative
    for call in (lambda: encoder_layers(model), lambda: apply(model, features=("dropout",))):
        with pytest.raises(UsageError, match="model: expected attention of .*, got Relative"):
            call()


def test_two_encoders_are_refused() -> None:
    pair = nn.ModuleDict({"a": make_model(), "b": make_model()})
    with pytest.raises(UsageError, match="expected one encoder, got 2 in ModuleDict"):
        encoder_layers(pair)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.float64, torch.long])
def test_masks_of_every_form_are_as_stocks(implementation: str, kind: torch.dtype) -> None:
    model = make_model().eval()
    model.set_attn_implementation(implementation)
    ids = make_batch()["input_ids"]
    keep = torch.arange(9) < torch.tensor([[9], [5], [3], [9]])
    masks: dict[str, Tensor] = {"2-d": keep.to(kind)}
    wide = keep[:, None, None].expand(4, 1, 9, 9)
    if kind == torch.bool:
        masks["4-d"] = wide
    elif kind == torch.float32:
        masks["4-d"] = torch.zeros(wide.shape).masked_fill(~wide, torch.finfo(kind).min)
        masks["bias"] = torch.randn(4, 4, 9, 9)
    for name, mask in masks.items():
        wanted = failure = None
        try:
            wanted = model(ids, attention_mask=mask).logits
        except RuntimeError as error:
            failure = error
        twin = copy.deepcopy(model)
        apply(twin, features=("dropout",))
        if failure is not None:
            continue
        torch.testing.assert_close(
            twin(ids, attention_mask=mask).logits, wanted, rtol=1e-4, atol=1e-5, msg=name
        )


def test_attentions_are_given_where_stock_gives_them() -> None:
    model, batch = make_model().eval(), make_batch()
    model.set_attn_implementation("eager")
    wanted = model(**batch, output_attentions=True).attentions
    apply(model, features=("dropout",))
    got = model(**batch, output_attentions=True).attentions
    assert len(got) == len(wanted) == 2
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, two)
    restore(model)
    assert model.config._attn_implementation == "eager"
    apply(
        model,
        plan(sensitivity(model, [batch]), Budget(flops=0.7), multiples=SMALL, minimums=SMALL),
        features=("dropout",),
    )
    assert len(compact(model)(**batch, output_attentions=True).attentions) == 2
