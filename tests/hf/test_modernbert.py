"""What only ModernBERT has: windows, averaged tokens, biases by choice, rotations, one linear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sensikernels._core.errors import UsageError
from sensikernels.hf import apply, compact, export, restore, sensitivity, training_flops, use_packed
from sensikernels.hf.families.modernbert import MODERNBERT
from sensikernels.masks import Budget, Geometry, Plan, plan
from sensikernels.methods import BitFit, Run
from tests.hf.families import draw, make, tensors
from tests.hf.packed_cases import SMALL, grads, pack, same_on_average
from tests.hf.test_encoders import STEP, trim, without_positions
from tests.hf.test_export import without_us

CLASSIFIER, TOKENS, CHOICE = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForMultipleChoice",
)
BIASES = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True)
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "averaged": {"classifier_pooling": "mean"},
    "biases": BIASES,
    "no windows": {"layer_types": ["full_attention"] * 2},
    "windows alone": {"layer_types": ["sliding_attention"] * 2},
    "a window of one token": {"local_attention": 2},
    "a window as long as the longest": {"local_attention": 16},
    "another activation": {"hidden_activation": "gelu_pytorch_tanh"},
    "rotations scaled": {
        "rope_parameters": {
            kind: {**_YARN, "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "several numbers": {"num_labels": 2, "problem_type": "regression"},
    "several labels": {"problem_type": "multi_label_classification"},
}


def built(head: str = CLASSIFIER, **named: Any) -> Any:
    return make("modernbert", head, **named)


def drawn(head: str = CLASSIFIER, *, ragged: bool = True, **named: Any) -> dict[str, Any]:
    batch: dict[str, Any] = draw(head, "modernbert", ragged=ragged)
    if "problem_type" in named:
        batch["labels"] = torch.rand(len(batch["labels"]), 2)
    return batch


def compare(stock: nn.Module, fast: nn.Module, batch: dict[str, Any], given: Any = None) -> None:
    """Loss and gradients of ``fast`` on ``given`` (default: the batch) are stock's on the batch."""
    wanted, got = stock(**batch), fast(**(batch if given is None else given))
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    wanted.loss.backward()
    got.loss.backward()
    theirs, ours = grads(stock), grads(fast)
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].to_dense(), value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "given packed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_takes_the_fast_step(variant: str, packed: bool) -> None:
    named = VARIANTS[variant]
    batch = drawn(**named)
    stock, fast = built(**named), built(**named)
    report = apply(fast, features=(*STEP, "words"))
    assert ("last layer on first tokens" in report) == (variant != "averaged")
    compare(stock, fast, batch, without_positions(pack(batch)) if packed else batch)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("features", [("packed",), ("packed", "cls"), STEP])
def test_choices_are_read_as_stock_reads_them(pooling: str, features: tuple[str, ...]) -> None:
    stock, fast = (built(CHOICE, classifier_pooling=pooling) for _ in range(2))
    apply(fast, features=features)
    compare(stock, fast, drawn(CHOICE))


@pytest.mark.parametrize(
    ("head", "pooling"), [(CLASSIFIER, "mean"), (TOKENS, "cls"), (CHOICE, "mean")]
)
def test_padding_on_the_left(head: str, pooling: str) -> None:
    batch = {
        name: value.flip(-1) if value.ndim > 1 else value for name, value in drawn(head).items()
    }
    stock, fast = (built(head, classifier_pooling=pooling) for _ in range(2))
    apply(fast, features=("packed", "fused"))
    wanted, got = stock(**batch), fast(**batch)
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-5, atol=1e-5)


def test_padding_between_tokens_is_refused() -> None:
    model, batch = built(TOKENS), drawn(TOKENS)
    apply(model, features=("packed",))
    batch["attention_mask"][1, 4] = 0
    with pytest.raises(UsageError, match="attention_mask: expected no padding between tokens"):
        model(**batch)


def test_positions_come_third_and_types_are_ignored() -> None:
    batch = {k: v for k, v in drawn("Model").items() if k != "attention_mask"}
    positions = torch.arange(9).flip(0)[None]
    model = built("Model").eval()
    wanted = model(batch["input_ids"], None, positions).last_hidden_state
    use_packed(model)
    got = model(batch["input_ids"], None, positions, token_type_ids=batch["input_ids"] % 2)
    torch.testing.assert_close(got.last_hidden_state, wanted, rtol=1e-4, atol=1e-5)


def test_the_row_of_padding_gets_no_gradient() -> None:
    for features in (("packed",), STEP, (*STEP, "words")):
        model, batch = built(), drawn()
        del batch["attention_mask"]
        apply(model, features=features)
        model(**batch).loss.backward()
        grad = grads(model)["model.embeddings.tok_embeddings.weight"].to_dense()
        assert not grad[1].any()
        assert grad[2:].any()


RATES = dict.fromkeys(
    ("attention_dropout", "mlp_dropout", "embedding_dropout", "classifier_dropout"), 0.2
)


@pytest.mark.parametrize("features", [("dropout",), ("packed",), STEP])
def test_every_rate_of_dropout_drops(features: tuple[str, ...]) -> None:
    for rate in RATES:
        model = built(**{rate: 0.5})
        apply(model, features=features)
        losses = {model(**drawn()).loss.item() for _ in range(3)}
        assert len(losses) == 3, rate
    same_on_average(built(**RATES), drawn(), lambda model: apply(model, features=features))


def planned(model: nn.Module, batches: list[dict[str, Tensor]], **named: Any) -> Plan:
    scores = sensitivity(model, batches, **named)
    return plan(scores, Budget(flops=0.6), multiples=SMALL, minimums=SMALL)


@pytest.mark.parametrize("criterion", ["mask-gradient", "learned", "first-order", "magnitude"])
@pytest.mark.parametrize("biases", [{}, BIASES], ids=["no biases", "biases"])
def test_a_unit_is_a_row_of_every_part(
    criterion: str, biases: dict[str, bool], tmp_path: Path
) -> None:
    model, batch = built(**biases).eval(), drawn()
    before = tensors(model, batch)["logits"]
    made = planned(model, [batch], criterion=criterion)
    made.save(tmp_path / "plan")
    made = Plan.load(tmp_path / "plan")
    by_module = {m.module: m for c in made.couplings for m in c.members}
    for layer in ("model.layers.0", "model.layers.1"):
        assert by_module[f"{layer}.attn.Wqkv"].repeats == 3
        assert by_module[f"{layer}.mlp.Wi"].repeats == 2
        bits = made.weight_masks[f"{layer}.mlp.Wi"].dense()[:, 0].view(2, -1)
        assert torch.equal(bits[0], bits[1])
        assert torch.equal(bits[0], made.weight_masks[f"{layer}.mlp.Wo"].dense()[0])
        qkv = made.weight_masks[f"{layer}.attn.Wqkv"].dense()[:, 0].view(3, -1)
        assert torch.equal(qkv[0], qkv[1])
        assert torch.equal(qkv[1], qkv[2])
        assert torch.equal(qkv[0], made.weight_masks[f"{layer}.attn.Wo"].dense()[0])
    apply(model, made, form="masked")
    wanted = tensors(model, batch)["logits"]
    restore(model)
    apply(model, made, features=STEP)
    for one in (model, compact(model), export(model), export(compact(model))):
        got = tensors(one.eval(), batch)["logits"]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    restore(model)
    assert torch.equal(tensors(model, batch)["logits"], before)


def test_a_compact_one_loads_without_this_package(tmp_path: Path) -> None:
    model = built(classifier_pooling="mean").eval()
    apply(model, trim(model, CLASSIFIER))
    small = export(model, tmp_path / "small", form="compact")
    words = torch.arange(1, 10)[None]
    assert (
        without_us(tmp_path / "small") == small(words).logits.detach().double().flatten().tolist()
    )


@pytest.mark.parametrize("features", [(), STEP], ids=["padded", "packed"])
def test_a_plan_holds_the_flops_that_are_counted(features: tuple[str, ...]) -> None:
    # Short sentences in full windows: pairs outside of a window are not counted one way.
    model = built(local_attention=32)
    batch = drawn(ragged=False)
    if features:
        apply(model, features=features)
    geometry = Geometry.uniform(9)
    if features:
        batch = without_positions(pack(batch, multiple=4))
        geometry = Geometry.of_packed(batch["cu_seqlens"].diff().numpy(), 36)
    scores = sensitivity(model, [], "magnitude")
    made = plan(scores, Budget(flops=0.6), geometry=geometry, multiples=SMALL, minimums=SMALL)
    dense = training_flops(model, batch) / 36
    assert made.flops_dense == pytest.approx(dense, rel=0.02)
    if features:
        restore(model)
    apply(model, made, features=features)
    assert made.flops_planned == pytest.approx(training_flops(model, batch) / 36, rel=0.02)


def test_dimensions_are_refused() -> None:
    with pytest.raises(UsageError, match="granularity: expected one of heads for ModernBERT"):
        sensitivity(built(), [], "magnitude", granularity="dimensions")
    assert MODERNBERT.padded_because == ""


def run_of(model: nn.Module) -> Run:
    optimizer = torch.optim.AdamW(model.parameters())
    geometry = Geometry.uniform(9)
    return Run(model=model, optimizer=optimizer, max_steps=1, batches=list, geometry=geometry)


def test_bitfit_says_that_there_are_no_biases() -> None:
    model = built()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(UsageError, match="subsets: expected one of all, .* for ModernBERT, got q"):
        BitFit(subsets=["intermediate", "query"]).begin(run_of(model))
    for subsets in (["all"], ["intermediate"], ["output_layernorm", "intermediate"]):
        with pytest.raises(UsageError) as error:
            BitFit(subsets=subsets).begin(run_of(model))
        assert str(error.value) == (
            "subsets: expected biases in the encoder (frozen trains the head alone), got none of "
            f"{', '.join(subsets)} in ModernBertForSequenceClassification"
        )
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    run = run_of(model)
    BitFit(subsets=["frozen"]).begin(run)
    assert run.plan is not None
    assert run.plan.trainable == ("classifier.weight", "classifier.bias")


def test_bitfit_trains_the_biases_that_there_are() -> None:
    run = run_of(built(**BIASES))
    BitFit().begin(run)
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    names = {name for name, _ in run.model.named_parameters() if "bias" in name}
    assert trained == names | {"classifier.weight"}
