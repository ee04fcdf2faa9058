"""A pass of ours honours every option, hook and replacement of the modules that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sensikernels._core.errors import UsageError
from sensikernels.hf import apply, restore
from sensikernels.masks import Mask, Plan
from tests.hf.conftest import make_batch, make_model
from tests.hf.packed_cases import grads
from tests.hf.test_module_state import FIRST, pickled

FUSED = (
    ("packed",),
    ("packed", "fused"),
    ("packed", "cls", "fused"),
    ("packed", "fused", "words"),
    ("dropout", "packed", "cls", "fused", "words"),
)
OUT = "bert.encoder.layer.0.output"


def padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without a mask: padding tokens are attended to, as every other token."""
    batch = {k: v for k, v in batch.items() if k != "attention_mask"}
    batch["input_ids"][:, -2:] = 0
    return batch


def other_padding(model: nn.Module) -> None:
    model.get_input_embeddings().padding_idx = 5


def padding_of_types(model: nn.Module) -> None:
    model.get_submodule("bert.embeddings.token_type_embeddings").padding_idx = 0


def no_padding(model: nn.Module) -> None:
    model.get_input_embeddings().padding_idx = None


def max_norm(model: nn.Module) -> None:
    model.get_input_embeddings().max_norm = 0.05


def by_frequency(model: nn.Module) -> None:
    model.get_input_embeddings().scale_grad_by_freq = True


def norm_without_affine(model: nn.Module) -> None:
    model.get_submodule(OUT).LayerNorm = nn.LayerNorm(32, elementwise_affine=False)


def norm_without_bias(model: nn.Module) -> None:
    model.get_submodule(OUT).LayerNorm = nn.LayerNorm(32, bias=False)


def other_eps(model: nn.Module) -> None:
    model.get_submodule(OUT).LayerNorm.eps = 0.3


def rms_norm(model: nn.Module) -> None:
    model.get_submodule(OUT).LayerNorm = nn.RMSNorm(32)


def identity_for_dropout(model: nn.Module) -> None:
    for name in ("bert.embeddings", OUT):
        model.get_submodule(name).dropout = nn.Identity()


def tanh_gelu(model: nn.Module) -> None:
    model.get_submodule("bert.encoder.layer.0.intermediate").intermediate_act_fn = nn.GELU("tanh")


def relu(model: nn.Module) -> None:
    model.get_submodule("bert.encoder.layer.1.intermediate").intermediate_act_fn = nn.ReLU()


def no_bias(model: nn.Module) -> None:
    for name in (f"{OUT}.dense", "bert.encoder.layer.1.attention.self.key"):
        model.get_submodule(name).bias = None


def scaled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 1.5


def hook(path: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.get_submodule(path).register_forward_hook(scaled)

    return change


def half_gradient(module: nn.Module, grads_in: Any, grads_out: Any) -> Any:
    return tuple(None if g is None else g * 0.5 for g in grads_in)


def backward_hook(path: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.get_submodule(path).register_full_backward_hook(half_gradient)

    return change


LEAVES = {
    "linear": FIRST,
    "query": "bert.encoder.layer.0.attention.self.query",
    "intermediate": "bert.encoder.layer.0.intermediate.dense",
    "norm": f"{OUT}.LayerNorm",
    "embedding norm": "bert.embeddings.LayerNorm",
    "words": "bert.embeddings.word_embeddings",
    "dropout": f"{OUT}.dropout",
    "activation": "bert.encoder.layer.0.intermediate.intermediate_act_fn",
}
CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "as it is": lambda model: None,
    "padding_idx": other_padding,
    "padding_idx of types": padding_of_types,
    "no padding_idx": no_padding,
    "max_norm": max_norm,
    "norm without affine": norm_without_affine,
    "norm without bias": norm_without_bias,
    "eps": other_eps,
    "RMSNorm": rms_norm,
    "identity for dropout": identity_for_dropout,
    "tanh GELU": tanh_gelu,
    "ReLU": relu,
    "no bias": no_bias,
    **{f"hook on {name}": hook(path) for name, path in LEAVES.items()},
    **{
        f"backward hook on {name}": backward_hook(LEAVES[name])
        for name in ("linear", "norm", "intermediate", "activation")
    },
}


@pytest.mark.parametrize("features", FUSED)
@pytest.mark.parametrize("name", CHANGES)
def test_as_the_stock_modules(name: str, features: tuple[str, ...]) -> None:
    stock, model = make_model(), make_model()
    for one in (stock, model):
        CHANGES[name](one)
        one.double()
    batch = padded(make_batch())
    wanted = stock(**batch)
    wanted.loss.backward()
    apply(model, features=features)
    got = model(**batch)
    got.loss.backward()
    torch.testing.assert_close(got.logits, wanted.logits, rtol=0, atol=1e-10)
    ours, theirs = grads(model), grads(stock)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key].to_dense(), value, rtol=0, atol=1e-10, msg=key)


def test_a_row_that_gets_no_gradient_gets_none() -> None:
    for features in FUSED:
        model = make_model()
        apply(model, features=features)
        model(**padded(make_batch())).loss.backward()
        grad = grads(model)["bert.embeddings.word_embeddings.weight"].to_dense()
        assert not grad[0].any()
        assert grad[1:].any()


@pytest.mark.parametrize(
    "path",
    [
        "bert.encoder",
        "bert.encoder.layer.1",
        "bert.embeddings",
        "bert.encoder.layer.0.attention.self",
        "bert.encoder.layer.1.output",
    ],
)
def test_hooks_on_what_is_not_called_are_refused(path: str) -> None:
    model = make_model()
    handle = model.get_submodule(path).register_forward_hook(scaled)
    with pytest.raises(UsageError, match=f"model: {path.removeprefix('bert.')}: expected no hooks"):
        apply(model, features=("packed",))
    handle.remove()
    apply(model, features=("packed",))
    model.get_submodule(path).register_forward_pre_hook(lambda m, i: None)
    with pytest.raises(UsageError, match="expected no hooks on a module that packed tokens do not"):
        model(**make_batch())
    restore(model)
    model(**make_batch())


def test_a_table_that_counts_tokens_is_refused() -> None:
    model = make_model()
    by_frequency(model)
    with pytest.raises(UsageError, match="word_embeddings: expected no scale_grad_by_freq"):
        apply(model, features=("packed",))


def test_hooks_that_record_outputs_do_not_count() -> None:
    model, batch = make_model(), make_batch()
    model(**batch, output_hidden_states=True)  # transformers leaves its hooks behind
    wanted = model(**batch).loss
    apply(model, features=("packed", "fused"))
    torch.testing.assert_close(model(**batch).loss, wanted)


def test_hooks_on_selective_layers_are_called_in_a_group() -> None:
    names = [f"bert.encoder.layer.0.attention.self.{part}" for part in ("query", "key", "value")]
    mask = Mask.rows(torch.arange(32) % 4 == 0, (32, 32))
    models = [make_model().double() for _ in range(2)]
    for model in models:
        model.get_submodule(names[1]).register_forward_hook(scaled)
    made = Plan(method="x", update_masks=dict.fromkeys(names, mask))
    apply(models[1], made, features=("packed", "fused"))
    batch = make_batch()
    torch.testing.assert_close(models[1](**batch).logits, models[0](**batch).logits)


def test_modes_of_single_modules_are_honoured() -> None:
    stock, model = make_model(dropout=0.5), make_model(dropout=0.5)
    for one in (stock, model):
        one.train()
        for module in one.modules():
            if isinstance(module, nn.Dropout) or hasattr(module, "attention_head_size"):
                module.eval()
    apply(model, features=("dropout", "packed", "cls", "fused"))
    torch.testing.assert_close(model(**make_batch()).logits, stock(**make_batch()).logits)


def test_replaced_dropout_is_still_nn_dropout() -> None:
    model = make_model(dropout=0.1)
    handle = model.get_submodule(f"{OUT}.dropout").register_forward_hook(scaled)
    before = {n: type(m) for n, m in model.named_modules()}
    apply(model, features=("dropout",))
    assert all(isinstance(m, before[n]) for n, m in model.named_modules())
    twin = pickled(model)
    restore(twin)
    assert {n: type(m) for n, m in twin.named_modules()} == before
    handle.remove()
    restore(model)
    assert not model.get_submodule(f"{OUT}.dropout")._forward_hooks
