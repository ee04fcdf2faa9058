"""A captured training step of a small BERT: the same steps as eager ones, without a host wait."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sensikernels.hf import use_counter_dropout, use_packed
from sensikernels.hf.load import random_model
from sensikernels.ops.subset_adamw.native import why_not
from sensikernels.optim import SubsetAdamW
from sensikernels.training.graph import GraphedStep
from tests.ops.subset_adamw.cases import kept_of

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
Batch = dict[str, Tensor]
NoSync = Callable[[], AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def plain_memory() -> None:
    """Filling memory with NaN is not captured; what is read unwritten, ``test_kernels`` finds."""
    torch.use_deterministic_algorithms(False)


def bert(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    model = random_model(
        "bert",
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        vocab_size=500,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return model.to(DEVICE, dtype).train()


def batches(count: int, *lengths: int) -> list[Batch]:
    made = torch.Generator().manual_seed(3)
    found = []
    for length in [n for _ in range(count) for n in lengths or (16,)]:
        ids = torch.randint(5, 500, (4, length), generator=made)
        kept = torch.ones_like(ids)
        kept[0, length // 2 :] = 0
        labels = torch.randint(0, 2, (4,), generator=made)
        batch = {"input_ids": ids, "attention_mask": kept, "labels": labels}
        found.append({name: value.to(DEVICE) for name, value in batch.items()})
    return found


def subset(model: nn.Module) -> torch.optim.Optimizer:
    reason = why_not(torch.device(DEVICE), {p.dtype for p in model.parameters()})
    if reason is not None:
        pytest.skip(f"SubsetAdamW's kernel: {reason}")
    return SubsetAdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=True)


@pytest.mark.parametrize("make", [subset, fused], ids=["subset", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replays_are_the_eager_steps(make: Any, dtype: torch.dtype):
    model = bert(dtype=dtype)
    twin = copy.deepcopy(model)
    optimizer, other = make(model), make(twin)
    step = GraphedStep(model, optimizer)
    plain = GraphedStep(twin, other)
    plain.reason = "the comparison"
    mine, its = [], []
    for turn, batch in enumerate(batches(6, 16, 24)):
        for own in (optimizer, other):
            own.param_groups[0]["lr"] = torch.tensor(1e-3 / (1 + turn), device=DEVICE)
        mine.append(step(batch))
        its.append(plain(batch))
    assert step.explain() == "step: CUDA graphs (2 batch shapes captured)"
    tolerance = 2e-3 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(torch.stack(mine), torch.stack(its), rtol=tolerance, atol=tolerance)


def test_a_replay_waits_for_nothing(no_host_sync: NoSync):
    model = bert(dropout=0.1)
    use_counter_dropout(model)
    step = GraphedStep(model, subset(model))
    given = batches(4)
    for batch in given:
        step(batch)
    assert step.reason is None
    with no_host_sync():
        losses = [step(batch) for batch in given]
    assert torch.stack(losses).isfinite().all()


def packed(*lengths: int, tokens: int = 64) -> dict[str, Any]:
    made = torch.Generator().manual_seed(sum(n * 7**i for i, n in enumerate(lengths)))
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = torch.randint(5, 500, (1, tokens), generator=made)
    labels = torch.randint(0, 2, (len(lengths),), generator=made)
    return {
        "input_ids": ids.to(DEVICE),
        "cu_seqlens": ends.to(DEVICE),
        "max_length": 32,
        "labels": labels.to(DEVICE),
    }


@pytest.mark.parametrize("fused", [True, False])
def test_packed_rows_of_other_lengths_share_a_graph(fused: bool):
    model = bert()
    use_packed(model, fused=fused)
    twin = copy.deepcopy(model)
    step, plain = (GraphedStep(m, subset(m)) for m in (model, twin))
    plain.reason = "the comparison"
    for batch in (packed(*n) for n in ((9, 20, 30), (32, 5, 8), (1, 31, 17), (20, 20, 20))):
        torch.testing.assert_close(step(batch), plain(batch), rtol=2e-3, atol=2e-3)
    assert step.explain() == "step: CUDA graphs (1 batch shapes captured)"


def test_the_learning_rate_is_read_anew():
    model = bert()
    optimizer = subset(model)
    step = GraphedStep(model, optimizer)
    for batch in batches(3):
        step(batch)
    (captured,) = step._graphs.values()
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    step(batches(1)[0])
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.param_groups[0]["lr"] = 1e-2
    step(batches(1)[0])
    assert not any(
        torch.equal(a, b)
        for a, b in zip(before, model.parameters(), strict=True)
        if a.dim() > 1 and len(a) < 500
    )
    assert list(step._graphs.values()) == [captured]


def test_dropout_draws_anew_in_each_replay():
    model = bert(dropout=0.5)
    use_counter_dropout(model)
    optimizer = subset(model)
    optimizer.param_groups[0]["lr"] = 0.0
    step = GraphedStep(model, optimizer)
    (batch,) = batches(1)
    losses = [float(step(batch)) for _ in range(8)]
    assert step.reason is None
    assert len(set(losses)) == 8


def test_a_mask_written_in_place_is_seen_and_a_new_one_captured():
    from sensikernels import Mask, MaskedLinear

    grids = torch.zeros(2, 4, 4, dtype=torch.bool)
    grids[0].view(-1)[:8] = True
    grids[1].view(-1)[8:] = True
    linear = nn.Linear(256, 256, device=DEVICE)
    layers = [
        MaskedLinear.from_linear(linear, Mask(grid=g, block_shape=(64, 64), shape=(256, 256)))
        for g in grids
    ]
    model = nn.Sequential(layers[0], nn.Linear(256, 2, device=DEVICE))
    optimizer = subset(model)
    optimizer.param_groups[0]["lr"] = 0.0
    step = GraphedStep(model, optimizer, lambda b: model(b["x"]).square().mean())
    batch = {"x": torch.randn(128, 256, device=DEVICE)}
    for _ in range(3):
        step(batch)
    assert step.reason is None
    (captured,) = step._graphs.values()
    model[0].weight.data.copy_(layers[1].weight.data)
    for name, old in vars(layers[0].layout).items():
        if isinstance(old, Tensor):
            old.copy_(getattr(layers[1].layout, name))
    got, want = step(batch), model[1](layers[1](batch["x"])).square().mean()
    torch.testing.assert_close(got, want.detach(), rtol=1e-3, atol=1e-5)
    assert list(step._graphs.values()) == [captured]
    layers[0].layout = layers[1].layout
    for _ in range(3):
        torch.testing.assert_close(step(batch), want.detach(), rtol=1e-3, atol=1e-5)
    assert list(step._graphs.values()) != [captured]


def test_a_step_that_waits_for_the_device_stays_eager():
    model = bert()
    step = GraphedStep(model, subset(model), lambda batch: _read(model(**batch).loss))
    losses = [float(step(batch)) for batch in batches(4)]
    assert (step.reason or "").startswith("capture failed: ")
    assert len(set(losses)) == 4


def _read(loss: Tensor) -> Tensor:
    assert loss.item() == loss.item()
    return loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparse_words_are_captured(dtype: torch.dtype, no_host_sync: NoSync):
    """Ten steps of packed tokens with row-sparse words: those of eager ones, and none waits."""
    model = bert(dtype=dtype)
    use_packed(model)
    model.get_input_embeddings().sparse = True
    twin = copy.deepcopy(model)
    step, plain = (GraphedStep(m, subset(m)) for m in (model, twin))
    plain.reason = "the comparison"
    tolerance = 2e-3 if dtype == torch.float32 else 5e-2
    for turn in range(10):
        batch = packed(9, 20, 30 - turn)
        want = plain(batch)
        if turn < 3:
            got = step(batch)
        else:
            with no_host_sync():
                got = step(batch)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert step.explain() == "step: CUDA graphs (1 batch shapes captured)"
    for one in (step, plain):
        assert isinstance(one.optimizer, SubsetAdamW)
        one.optimizer.flush()
    words, others = (m.get_input_embeddings().weight for m in (model, twin))
    assert words.grad is None
    torch.testing.assert_close(words, others, rtol=tolerance, atol=tolerance)


def test_an_eager_step_with_sparse_words_waits_for_nothing(no_host_sync: NoSync):
    model = bert()
    use_packed(model)
    model.get_input_embeddings().sparse = True
    optimizer = subset(model)
    step = GraphedStep(model, optimizer)
    step.reason = "eager"
    step(packed(9, 20, 30))
    with no_host_sync():
        step(packed(9, 20, 30))


def test_torchs_sparse_padding_stays_eager():
    model = bert()  # padded tokens: torch looks up which gradients are of the padding
    model.get_input_embeddings().sparse = True
    step = GraphedStep(model, subset(model))
    losses = [float(step(batch)) for batch in batches(4)]
    assert len(set(losses)) == 4
    assert "sparse with a padding_idx" in (step.reason or "")


@pytest.mark.parametrize("kind", ["rows", "blocks", "elements"])
def test_other_kept_entries_need_no_capture(kind: str):
    """From the first change on, the same count and fewer."""
    model = bert()
    twin = copy.deepcopy(model)
    optimizers = [subset(m) for m in (model, twin)]
    step, plain = (GraphedStep(m, o) for m, o in zip((model, twin), optimizers, strict=True))
    plain.reason = "the comparison"
    captured = []
    for seed, share in enumerate((0.5, 0.4, 0.3, 0.45, 0.1)):
        for net, optimizer in zip((model, twin), optimizers, strict=True):
            weight = net.bert.encoder.layer[0].intermediate.dense.weight
            shape = tuple(weight.shape)
            optimizer.set_kept(weight, kept_of(kind, shape, seed, share))
        before = [m.bert.encoder.layer[0].intermediate.dense.weight.clone() for m in (model, twin)]
        for batch in batches(3):
            torch.testing.assert_close(step(batch), plain(batch), rtol=2e-3, atol=2e-3)
        moved = [
            m.bert.encoder.layer[0].intermediate.dense.weight != old
            for m, old in zip((model, twin), before, strict=True)
        ]
        assert torch.equal(*moved)
        captured += step._graphs.values()
    assert step.reason is None
    assert len(set(map(id, captured))) == 1
