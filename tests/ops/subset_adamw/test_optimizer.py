"""``SubsetAdamW`` as a torch optimizer: groups, checkpoints, scaling, changes of shape."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sensikernels._core.errors import UsageError
from sensikernels.optim import SubsetAdamW
from tests.ops.subset_adamw.cases import BACKENDS, KINDS, kept_of, same_bits


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)).to(dtype)


def backward(model: nn.Module, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 12, generator=generator).to(dtype)
    model.zero_grad()
    loss = model(x).float().square().mean() * scale
    loss.backward()
    return loss


def index(*positions: int) -> Tensor:
    return torch.tensor(positions, dtype=torch.int32)


def same_state(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return same_bits(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return bool(a == b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_from_a_checkpoint_is_bit_equal(
    backend: str, dtype: torch.dtype, kind: str
) -> None:
    def build(model: nn.Module) -> SubsetAdamW:
        groups = [
            {"params": list(model[0].parameters()), "lr": 1e-2},
            {"params": list(model[2].parameters()), "weight_decay": 0.0},
        ]
        return SubsetAdamW(groups, backend=backend, max_grad_norm=1.0)

    model = net(dtype)
    optimizer = build(model)
    for seed in range(3):
        for i, param in enumerate(model.parameters()):
            optimizer.set_kept(param, kept_of(kind, tuple(param.shape), i + seed))
        backward(model, seed)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = net(dtype)
    again.load_state_dict(saved["model"])
    resumed = build(again)
    resumed.load_state_dict(saved["optimizer"])
    assert same_state(optimizer.state_dict(), resumed.state_dict())
    for seed in range(3, 6):
        for one, opt in ((model, optimizer), (again, resumed)):
            backward(one, seed)
            opt.step()
    assert same_state(optimizer.state_dict(), resumed.state_dict())
    assert all(map(same_bits, model.parameters(), again.parameters()))


def test_saved_state_is_not_shared() -> None:
    model = net()
    optimizer = SubsetAdamW(model.parameters())
    backward(model, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = SubsetAdamW(net().parameters())
    other.load_state_dict(optimizer.state_dict())
    backward(model, 1)
    optimizer.step()
    assert same_state(other.state_dict(), saved)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_step_alike(copier: Any) -> None:
    model = net()
    optimizer = SubsetAdamW(model.parameters(), max_grad_norm=1.0)
    optimizer.set_kept(model[0].weight, ("rows", index(1, 4)))
    backward(model, 0)
    optimizer.step()
    model2, optimizer2 = copier((model, optimizer))
    for one, opt in ((model, optimizer), (model2, optimizer2)):
        backward(one, 1)
        opt.step()
    assert all(map(same_bits, model.parameters(), model2.parameters()))
    assert optimizer2.max_grad_norm == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scaler(backend: str) -> None:
    plain, scaled = net(), net()
    optimizers = [
        SubsetAdamW(m.parameters(), lr=1e-2, backend=backend, max_grad_norm=0.01)
        for m in (plain, scaled)
    ]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for seed in range(5):
        backward(plain, seed)
        optimizers[0].step()
        backward(scaled, seed, float(scaler.scale(torch.ones(()))))
        scaler.step(optimizers[1])
        scaler.update()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

    before = copy.deepcopy((scaled.state_dict(), optimizers[1].state_dict()))
    backward(scaled, 9, 1e38)
    next(scaled.parameters()).grad[0, 0] = float("inf")
    scaler.step(optimizers[1])
    scale = scaler.get_scale()
    scaler.update()
    assert scaler.get_scale() < scale
    assert same_state(before, (scaled.state_dict(), optimizers[1].state_dict()))


def test_grad_scaler_after_unscaling_and_clipping_by_hand() -> None:
    plain, scaled = net(), net()
    optimizers = [SubsetAdamW(m.parameters(), lr=1e-2) for m in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(3):
        backward(plain, seed)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
        optimizers[0].step()
        backward(scaled, seed, float(scaler.scale(torch.ones(()))))
        scaler.unscale_(optimizers[1])
        torch.nn.utils.clip_grad_norm_(scaled.parameters(), 0.01)
        scaler.step(optimizers[1])
        scaler.update()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_scheduler_writes_a_tensor_rate_in_place() -> None:
    """The tensor a captured graph reads keeps its address through scheduler and checkpoint."""
    model, rate = net(), torch.tensor(1e-2)
    optimizer = SubsetAdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for seed in range(3):
        backward(model, seed)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(1e-2 / 8)


def test_closure_schedulers_and_groups() -> None:
    model = net()
    optimizer = SubsetAdamW(model[0].parameters(), lr=1.0, weight_decay=0.0)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.5})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step else 0.0)
    before = [p.detach().clone() for p in model.parameters()]
    loss = optimizer.step(lambda: backward(model, 0))
    assert loss.requires_grad
    assert all(map(same_bits, before, model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.step()
    optimizer.step(lambda: backward(model, 0))
    moved = [(p - b).abs().max() for p, b in zip(model.parameters(), before, strict=True)]
    assert moved[0] > 0.6 > moved[2] > 0.3
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_parameters_without_gradient_do_not_step() -> None:
    model = net()
    optimizer = SubsetAdamW(model.parameters(), lr=0.1)
    for seed in range(3):
        backward(model, seed)
        if seed == 1:
            model[0].weight.grad = None
            before = model[0].weight.detach().clone()
        optimizer.step()
        if seed == 1:
            assert same_bits(before, model[0].weight)
    assert optimizer.state[model[0].weight]["step"] == 2
    assert optimizer.state[model[0].bias]["step"] == 3


def test_tensor_learning_rate_is_read_at_every_step() -> None:
    models = net(), net()
    rate = torch.tensor(1e-2)
    first = SubsetAdamW(models[0].parameters(), lr=rate)
    second = SubsetAdamW(models[1].parameters(), lr=1e-2)
    for seed in range(4):
        backward(models[0], seed)
        backward(models[1], seed)
        rate.fill_(0.1 * seed)
        second.param_groups[0]["lr"] = float(rate)
        first.step()
        second.step()
    assert all(map(same_bits, models[0].parameters(), models[1].parameters()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["hard_freeze", "as_published"])
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_slicing_state_equals_slicing_everything(
    kind: str, mode: str, axes: tuple[int, ...]
) -> None:
    """A step after slicing moves what remains just as a step without it."""
    shape = (12, 16)
    take = [torch.tensor([0, 3, 4, 7, 8, 11]), torch.tensor([1, 2, 8, 9, 10, 15])]
    take = [take[axis] for axis in axes]

    def cut(x: Tensor) -> Tensor:
        for axis, positions in zip(axes, take, strict=True):
            x = x.index_select(axis, positions)
        return x.contiguous()

    torch.manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        whole = nn.Parameter(torch.randn(shape).to(dtype))
        other = nn.Parameter(torch.randn(3).to(dtype))
        optimizer = SubsetAdamW([other, whole], lr=0.1, mode=mode)
        for seed in (0, 1):
            optimizer.set_kept(whole, kept_of(kind, shape, seed))
            whole.grad, other.grad = torch.randn(shape).to(dtype), torch.ones(3).to(dtype)
            optimizer.step()
        twin, twin_optimizer = copy.deepcopy((whole, optimizer))
        part = nn.Parameter(cut(whole.detach()))
        optimizer.slice_state(whole, part, take, axes)
        assert optimizer.param_groups[0]["params"][1] is part
        assert whole not in optimizer.state
        for _ in range(2):
            twin.grad = torch.randn(shape).to(dtype)
            part.grad = cut(twin.grad)
            twin_optimizer.step()
            optimizer.step()
        assert same_bits(part.detach(), cut(twin.detach()))


def test_slicing_before_the_first_step_and_by_one_index() -> None:
    linear = nn.Linear(6, 4)
    optimizer = SubsetAdamW(linear.parameters())
    optimizer.set_kept(linear.weight, ("rows", index(0, 2)))
    part = nn.Parameter(linear.weight.detach()[[2, 3]])
    optimizer.slice_state(linear.weight, part, torch.tensor([2, 3]), 0)
    assert optimizer.state[part]["kept"]["index"].tolist() == [0]
    part.grad = torch.ones(2, 6)
    optimizer.step()
    assert optimizer.state[part]["exp_avg"].shape == (1, 6)


def test_master_weights_follow_a_written_parameter_when_told() -> None:
    param = nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16))
    optimizer = SubsetAdamW([param], lr=0.0, weight_decay=0.0)
    optimizer.set_kept(param, ("rows", index(1, 2)))
    param.grad = torch.ones_like(param)
    optimizer.step()
    param.data.fill_(2.0)
    optimizer.refresh_master()
    optimizer.step()
    assert bool((param == 2).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_published_lets_frozen_entries_drift(backend: str) -> None:
    """Mask the gradient and leave the optimizer as it is, as DPS and Child-Tuning do."""
    model, twin = net(), net()
    ours = SubsetAdamW(model.parameters(), lr=1e-2, mode="as_published", backend=backend)
    theirs = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    weight = model[0].weight
    for seed in range(6):
        backward(model, seed)
        backward(twin, seed)
        if seed >= 3:
            ours.set_kept(weight, ("rows", index(0, 5)))
            mask = torch.zeros(20, 1).index_fill(0, torch.tensor([0, 5]), 1)
            twin[0].weight.grad *= mask
        before = weight.detach().clone()
        ours.step()
        theirs.step()
        assert bool((weight != before).all())
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr: expected a number >= 0"),
        ({"betas": (0.9, 1.0)}, "betas: expected two numbers in"),
        ({"eps": -1.0}, "eps: expected"),
        ({"weight_decay": -0.1}, "weight_decay: expected"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: expected"),
        ({"mode": "soft"}, "mode: expected one of as_published, hard_freeze, got 'soft'"),
        ({"backend": "cuda"}, "backend: expected one of"),
        ({"master_weights": "yes"}, "master_weights: expected"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        SubsetAdamW(net().parameters(), **options)


@pytest.mark.parametrize(
    "kept",
    [
        ("lines", index(0)),
        ("rows", torch.tensor([0])),
        ("rows", index(3, 1)),
        ("rows", index(1, 1)),
        ("rows", index(-1, 1)),
        ("rows", index(21)),
        ("rows", [1]),
        ("columns", index(12, 13)),
        ("blocks", index(0), (3, 3)),
        ("blocks", index(0)),
        ("elements", torch.zeros(29, dtype=torch.uint8)),
        ("elements", torch.zeros(30, dtype=torch.int8)),
        "rows",
    ],
)
def test_bad_kept_changes_nothing(kept: Any) -> None:
    model = net()
    optimizer = SubsetAdamW(model.parameters())
    optimizer.set_kept(model[0].weight, ("rows", index(2, 20)))  # 20: padding
    backward(model, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UsageError, match="kept"):
        optimizer.set_kept(model[0].weight, kept)
    assert same_state(before, optimizer.state_dict())


def test_other_bad_arguments() -> None:
    model = net()
    optimizer = SubsetAdamW(model.parameters())
    with pytest.raises(UsageError, match="param: expected a parameter of this optimizer"):
        optimizer.set_kept(nn.Parameter(torch.zeros(2)), None)
    with pytest.raises(UsageError, match="kept: expected rows or elements"):
        optimizer.set_kept(model[0].bias, ("columns", index(0)))
    with pytest.raises(UsageError, match="new_param: expected shape"):
        optimizer.slice_state(model[0].weight, model[2].weight, torch.tensor([0]), 0)
    with pytest.raises(UsageError, match="params: expected floating point"):
        optimizer.add_param_group({"params": [torch.zeros(2, dtype=torch.int32)]})
    assert len(optimizer.param_groups) == 1
    odd = SubsetAdamW([nn.Parameter(torch.zeros(4, dtype=torch.float64))], backend="native")
    odd.param_groups[0]["params"][0].grad = torch.ones(4, dtype=torch.float64)
    with pytest.raises(
        UsageError, match="native cannot serve this call: parameters of torch.float"
    ):
        odd.step()
    assert SubsetAdamW(model.parameters(), backend="reference").explain().backend == "reference"
