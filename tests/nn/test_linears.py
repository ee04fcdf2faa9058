"""Both modules beside ``nn.Linear``: swap, train, save, load, compile, distribute."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from sensikernels._core.errors import UsageError
from sensikernels.masks.mask import Mask
from sensikernels.nn import MaskedLinear, SelectiveLinear

OUT, IN = 24, 16


def masks() -> dict[str, Mask]:
    generator = torch.Generator().manual_seed(3)

    def some(*size: int) -> Tensor:
        return torch.rand(size, generator=generator) < 0.5

    return {
        "rows": Mask.rows(some(OUT), (OUT, IN)),
        "columns": Mask.columns(some(IN), (OUT, IN)),
        "heads": Mask.heads(some(6), (OUT, IN), head_dim=4),
        "blocks": Mask.blocks(some(5, 3), (5, 6), (OUT, IN)),
        "elements": Mask.elements(some(OUT, IN)),
        "empty": Mask.rows(torch.zeros(OUT).bool(), (OUT, IN)),
        "full": Mask.rows(torch.ones(OUT).bool(), (OUT, IN)),
    }


NAMES = list(masks())


def masked_dense(linear: nn.Linear, mask: Mask) -> nn.Linear:
    dense = copy.deepcopy(linear)
    dense.weight.data *= mask.dense()
    return dense


def train(
    module: nn.Module, batches: list[Tensor], after: Callable[[], object] = lambda: None
) -> list[float]:
    """SGD with momentum on a fixed objective; the losses."""
    optimizer = torch.optim.SGD(
        [p for p in module.parameters() if p.requires_grad], lr=0.05, momentum=0.9
    )
    losses = []
    for x in batches:
        loss = (module(x).sin() ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        after()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def trained_alike(module: nn.Module, dense: nn.Linear, mask: Mask) -> nn.Linear:
    """``module`` after some steps, merged: the weights and losses of ``dense``, gradient masked."""
    batches = list(torch.randn(5, 7, IN))

    def keep_masked() -> None:
        dense.weight.grad *= mask.dense()

    expected = train(dense, batches, keep_masked)
    assert train(module, batches) == pytest.approx(expected, rel=1e-4)
    merged = module.to_linear()
    torch.testing.assert_close(merged.weight, dense.weight)
    return merged


@pytest.mark.parametrize("name", NAMES)
def test_masked_trains_as_the_masked_dense_layer(name: str):
    mask, linear = masks()[name], nn.Linear(IN, OUT)
    module = MaskedLinear.from_linear(copy.deepcopy(linear), mask)
    dense = masked_dense(linear, mask)
    merged = trained_alike(module, dense, mask)
    torch.testing.assert_close(merged.bias, dense.bias)


@pytest.mark.parametrize("name", NAMES)
def test_selective_trains_as_the_dense_layer_with_a_masked_gradient(name: str):
    mask, linear = masks()[name], nn.Linear(IN, OUT)
    before = linear.weight.detach().clone()
    dense = copy.deepcopy(linear)
    module = SelectiveLinear.from_linear(copy.deepcopy(linear), mask)
    merged = trained_alike(module, dense, mask)
    assert torch.equal(merged.weight[~mask.dense()], before[~mask.dense()])


def test_parameters_that_lose_nothing_are_shared():
    linear = nn.Linear(IN, OUT)
    full = MaskedLinear.from_linear(linear, masks()["full"])
    assert full.weight is linear.weight
    assert full.bias is linear.bias
    assert full.to_linear().weight is linear.weight
    rows = MaskedLinear.from_linear(linear, masks()["rows"])
    assert rows.weight is not linear.weight
    assert rows.bias is linear.bias
    selective = SelectiveLinear.from_linear(linear, masks()["rows"])
    assert selective.weight.data_ptr() == linear.weight.data_ptr()
    assert selective.bias is linear.bias
    assert [n for n, _ in selective.named_parameters()] == ["values", "bias"]
    frozen = SelectiveLinear.from_linear(linear, masks()["rows"], train_bias=False)
    assert not frozen.bias.requires_grad
    assert linear.bias.requires_grad


@pytest.mark.parametrize("axis", [0, 1])
def test_compact_sides(axis: int):
    linear = nn.Linear(IN, OUT)
    if axis == 0:
        mask = masks()["rows"]
        module = MaskedLinear.from_linear(linear, mask, compact_output=True)
        kept = mask.grid.flatten()
        x = torch.randn(5, IN)
        torch.testing.assert_close(module(x), linear(x)[:, kept])
        assert module.bias.shape == (int(kept.sum()),)
    else:
        mask = masks()["columns"]
        module = MaskedLinear.from_linear(linear, mask, compact_input=True)
        kept = mask.grid.flatten()
        x = torch.randn(5, IN)
        torch.testing.assert_close(module(x[:, kept]), masked_dense(linear, mask)(x))
        x = x[:, kept]
    torch.testing.assert_close(module.to_linear()(x), module(x))
    full = module.to_linear(full=True)
    assert full.weight.shape == linear.weight.shape
    assert torch.equal(full.weight, linear.weight * mask.dense())
    assert "compact" in repr(module)
    fresh = copy.deepcopy(module)
    fresh.load_state_dict(linear.state_dict())
    assert torch.equal(fresh(x), module(x))


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_go_both_ways(name: str, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    mask, linear = masks()[name], nn.Linear(IN, OUT)
    x = torch.randn(3, IN)
    masked = MaskedLinear.from_linear(nn.Linear(IN, OUT), mask)
    masked.load_state_dict(linear.state_dict())
    torch.testing.assert_close(masked(x), masked_dense(linear, mask)(x))
    save_file(masked.state_dict(), tmp_path / "masked.safetensors")
    again = MaskedLinear.from_linear(nn.Linear(IN, OUT), mask)
    again.load_state_dict(load_file(tmp_path / "masked.safetensors"))
    assert torch.equal(again(x), masked(x))

    selective = SelectiveLinear.from_linear(nn.Linear(IN, OUT), mask)
    selective.load_state_dict(linear.state_dict())
    torch.testing.assert_close(selective(x), linear(x))
    train(selective, [x, x])
    state = selective.state_dict()
    assert sorted(state) == ["bias", "weight"]
    save_file(state, tmp_path / "selective.safetensors")
    plain = nn.Linear(IN, OUT)
    plain.load_state_dict(load_file(tmp_path / "selective.safetensors"))
    torch.testing.assert_close(plain(x), selective(x))


def test_loading_leaves_the_callers_dictionary_alone():
    state = nn.Linear(IN, OUT).state_dict()
    keys, shape = list(state), state["weight"].shape
    for kind in (MaskedLinear, SelectiveLinear):
        kind.from_linear(nn.Linear(IN, OUT), masks()["rows"]).load_state_dict(state)
        assert list(state) == keys
        assert state["weight"].shape == shape
    wrong = {**state, "weight": torch.zeros(3, 3)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        MaskedLinear.from_linear(nn.Linear(IN, OUT), masks()["rows"]).load_state_dict(wrong)


@pytest.mark.parametrize("kind", [MaskedLinear, SelectiveLinear])
@pytest.mark.parametrize("name", ["rows", "columns", "blocks"])
def test_compiled_training_matches_eager(kind: type, name: str):
    linear, mask = nn.Linear(IN, OUT), masks()[name]
    eager = kind.from_linear(copy.deepcopy(linear), mask)
    module = kind.from_linear(copy.deepcopy(linear), mask)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    batches = list(torch.randn(4, 7, IN))
    assert train(compiled, batches) == pytest.approx(train(eager, batches), rel=1e-5)
    torch.testing.assert_close(module.to_linear().weight, eager.to_linear().weight)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MaskedLinear, SelectiveLinear])
def test_compiled_by_inductor(kind: type):
    linear, mask = nn.Linear(IN, OUT), masks()["blocks"]
    eager = kind.from_linear(copy.deepcopy(linear), mask)
    module = kind.from_linear(copy.deepcopy(linear), mask)
    batches = list(torch.randn(3, 7, IN))
    losses = train(torch.compile(module, fullgraph=True), batches)
    assert losses == pytest.approx(train(eager, batches), rel=1e-4)


@pytest.mark.parametrize("kind", [MaskedLinear, SelectiveLinear])
@pytest.mark.parametrize("name", ["rows", "blocks"])
def test_checkpointing_accumulation_and_functional_call(kind: type, name: str):
    module = kind.from_linear(nn.Linear(IN, OUT), masks()[name])
    parameters = list(module.parameters())
    x = torch.randn(8, IN, requires_grad=True)
    expected = torch.autograd.grad(module(x).sin().sum(), [x, *parameters])
    recomputed = checkpoint(lambda x: module(x).sin().sum(), x, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(recomputed, [x, *parameters]), expected, strict=True):
        torch.testing.assert_close(a, b)
    for half in x.detach().chunk(2):
        module(half).sin().sum().backward()
    for parameter, grad in zip(parameters, expected[1:], strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    twice = {n: 2 * p.detach() for n, p in module.named_parameters()}
    y = functional_call(module, twice, (x,))
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 2
    torch.testing.assert_close(y, other(x))
    torch.testing.assert_close(
        torch.autograd.grad(module(x).sin().sum(), [x, *parameters])[0], expected[0]
    )


def test_selective_sees_every_way_to_step():
    """In place, through ``.data``, by load and by assignment: the forward follows the values."""
    module = SelectiveLinear.from_linear(nn.Linear(IN, OUT), masks()["blocks"])
    x = torch.randn(3, IN)

    def fresh() -> Tensor:
        return copy.deepcopy(module)(x)

    module(x).sum().backward()
    module.values.data.add_(1.0)
    assert torch.equal(module(x), fresh())
    with torch.no_grad():
        module.values.mul_(3.0)
        assert torch.equal(module(x), fresh())
        module.values.add_(1.0)
    assert torch.equal(module(x), fresh())
    module.values = nn.Parameter(module.values.detach() * 2)
    assert torch.equal(module(x), fresh())
    held = module(x)
    module(x).sum().backward()
    held.sum().backward()


@pytest.mark.parametrize("kind", [MaskedLinear, SelectiveLinear])
def test_dtype_device_and_copies(kind: type):
    module = kind.from_linear(nn.Linear(IN, OUT), masks()["blocks"])
    clone = copy.deepcopy(module)
    x = torch.randn(3, IN)
    assert torch.equal(clone(x), module(x))
    train(clone, [x])
    assert not torch.equal(clone(x), module(x))
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half.layout.row_ptr.dtype == torch.int32
    meta = copy.deepcopy(module).to("meta")
    assert meta(x.to("meta")).shape == (3, OUT)
    back = meta.to_empty(device="cpu")
    back.load_state_dict(module.state_dict())
    assert torch.equal(back(x), module(x))


def test_reprs_and_explanations():
    masked = MaskedLinear.from_linear(nn.Linear(IN, OUT), masks()["heads"], activation="gelu")
    assert "pattern=heads, density=" in repr(masked)
    assert "activation=gelu" in repr(masked)
    assert masked.explain().form == "compact"
    selective = SelectiveLinear.from_linear(nn.Linear(IN, OUT, bias=False), masks()["blocks"])
    assert "pattern=blocks" in repr(selective)
    assert "bias=False" in repr(selective)
    assert selective.explain(tokens=64).form in {"selective", "dense"}


@pytest.mark.parametrize("kind", [MaskedLinear, SelectiveLinear])
def test_refusals(kind: type):
    with pytest.raises(UsageError, match=r"mask: expected \[16, 24\], got \[24, 16\]"):
        kind.from_linear(nn.Linear(OUT, IN), masks()["rows"])
    with pytest.raises(UsageError, match="linear: expected an nn.Linear, got Conv1d"):
        kind.from_linear(nn.Conv1d(1, 1, 1), masks()["rows"])


def two_layers() -> nn.Sequential:
    """The same in every process; the random state after it too."""
    torch.manual_seed(0)
    linears = [nn.Linear(IN, OUT), nn.Linear(OUT, IN)]
    mask = Mask.blocks(torch.rand(4, 3) < 0.5, (4, 8), (IN, OUT))
    return nn.Sequential(
        MaskedLinear.from_linear(linears[0], masks()["rows"]),
        SelectiveLinear.from_linear(linears[1], mask),
    )


def replica(rank: int, folder: str) -> None:
    """One of two processes: half a batch each, gradients averaged."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = two_layers()
    batches = [b.chunk(2)[rank] for b in torch.randn(3, 8, IN)]
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    train(parallel, batches)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    # Who leaves while the other still talks takes gloo's threads down with it.
    del parallel
    dist.barrier()
    dist.destroy_process_group()


def test_data_parallel_on_two_processes():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(replica, (folder,), nprocs=2)
        states = [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]
    model = two_layers()
    train(model, list(torch.randn(3, 8, IN)))
    for name, value in model.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], value)
