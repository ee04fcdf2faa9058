"""LNSR: the loss against the equation computed from two plain forwards, packed and padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sensikernels._core.errors import UsageError
from sensikernels.hf import encoder_layers, use_counter_dropout, use_packed
from sensikernels.methods import method
from sensikernels.methods.lnsr import LNSR
from sensikernels.methods.streams import stream
from sensikernels.training.callback import SensiCallback
from tests.hf.conftest import make_batch, make_model
from tests.hf.families import draw, make
from tests.methods.part_runs import HEAD, assert_resumes, drive, make_run

DEPTH = 4


def model_of(**named: Any) -> nn.Module:
    return make_model(num_hidden_layers=DEPTH, **named)


def by_equation(
    model: nn.Module, batch: dict[str, Tensor], lnsr: LNSR, start: int, *, packed: bool
) -> Tensor:
    """Task loss and penalty of two forwards of the stock model; ``packed``: noise as it comes."""
    layers = [layer.module for layer in encoder_layers(model)]
    real = batch["attention_mask"].bool()
    seen: list[Tensor] = []

    def forward(noise: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor]:
        into: list[Tensor] = []
        made: list[Tensor] = []

        def before(_: Any, given: Any) -> Any:
            into.append(given[0])
            return None if noise is None else (given[0] + noise, *given[1:])

        hooks = [layers[start].register_forward_pre_hook(before)]
        for layer in layers[start:]:
            hooks.append(
                layer.register_forward_hook(
                    lambda _, __, out: made.append(out[0] if isinstance(out, tuple) else out)
                )
            )
        loss = model(**batch).loss
        for hook in hooks:
            hook.remove()
        return loss, made, into[0]

    loss, clean, x = forward(None)
    generator = stream(x.device, 0, 0, 0, 0)
    count = -(-int(real.sum()) // 32) * 32
    shape = (count, x.shape[-1]) if packed else x.shape
    drawn = torch.empty(shape).normal_(generator=generator)
    drawn = drawn * x.detach()[real].square().mean().sqrt() * lnsr.sigma
    noise = torch.zeros_like(x)
    noise[real] = drawn[: int(real.sum())] if packed else drawn[real]
    _, noisy, _ = forward(noise)
    for index, (one, two) in enumerate(zip(clean, noisy, strict=True)):
        last = packed and start + index == len(layers) - 1
        chosen = torch.zeros_like(real)
        chosen[:, 0] = True
        seen.append((two - one)[chosen if last else real].square().mean())
    return loss + lnsr.weight * torch.stack(seen).sum()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("layer", "start"), [(0.0, 0), (0.5, 2), (2 / 3, 3), (0.99, 3)])
def test_the_loss_and_its_gradients_are_the_equations(
    layer: float, start: int, packed: bool
) -> None:
    run, reference = make_run(model_of()), model_of()
    if packed:
        use_packed(run.model)
    lnsr, batch = LNSR(layer=layer, sigma=0.3, weight=2.0), make_batch()
    lnsr.begin(run)
    assert run.events == [f"step 0: layers from {start} on run twice, once on noise"]
    wanted = by_equation(reference, batch, lnsr, start, packed=packed)
    plain = reference(**batch).loss
    got = lnsr.loss(run, run.model, batch)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert float(got.detach() - plain.detach()) > 1e-2
    got.backward()
    wanted.backward()
    mine = dict(run.model.named_parameters())
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                mine[name].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name
            )


@pytest.mark.parametrize("form", ["padded", "packed", "counter"])
def test_both_passes_drop_the_same_and_disturb_no_random_stream(form: str) -> None:
    run = make_run(model_of(dropout=0.4))
    if form != "padded":
        use_packed(run.model)
    if form == "counter":
        use_counter_dropout(run.model)
    run.model.train()
    batch = make_batch()
    torch.manual_seed(3)
    plain = run.model(**batch).loss
    after = torch.get_rng_state()
    torch.manual_seed(3)
    still = LNSR(layer=0.5, weight=0.0).loss(run, run.model, batch)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(still, plain)
    torch.manual_seed(3)
    small = LNSR(layer=0.5, sigma=1e-4, weight=1.0).loss(run, run.model, batch)
    assert float((small - plain).detach()) < 1e-5  # other masks would make it about 1


def test_noise_depends_on_seed_step_and_batch_alone() -> None:
    def losses(lnsr: LNSR, seed: int, step: int, count: int = 1) -> list[float]:
        run = make_run(model_of(), seed=seed)
        run.step = step
        return [float(lnsr.loss(run, run.model, make_batch()).detach()) for _ in range(count)]

    one = losses(LNSR(), 1, 5, 2)
    used = LNSR()
    losses(used, 1, 2, 3)
    assert losses(used, 1, 5, 2) == one
    assert one[0] != one[1]
    assert len({*one, *losses(LNSR(), 2, 5), *losses(LNSR(), 1, 6)}) == 4


@pytest.mark.parametrize("packed", [False, True])
def test_the_model_is_as_it_was_whatever_happens(packed: bool) -> None:
    run, lnsr = make_run(model_of()), LNSR(layer=0.5)
    if packed:
        use_packed(run.model)
    modules = [layer.module for layer in encoder_layers(run.model)]
    before = [dict(vars(module)) for module in modules]
    lnsr.loss(run, run.model, make_batch())
    assert [vars(module) for module in modules] == before
    hook = modules[-1].output.dense.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lnsr.loss(run, run.model, make_batch())
    hook.remove()
    assert [vars(module) for module in modules] == before


@pytest.mark.parametrize("at", [1, 4])
def test_a_killed_run_goes_on(at: int) -> None:
    def fresh() -> Any:
        return make_run(model_of(dropout=0.1))

    assert_resumes(lambda: LNSR(sigma=0.3), fresh, at=at)


def test_bfloat16_keeps_what_little_the_noise_changes() -> None:
    run, lnsr = make_run(model_of().bfloat16()), LNSR(layer=0.5, sigma=0.05)
    loss = lnsr.loss(run, run.model, make_batch())
    plain = float(run.model(**make_batch()).loss.detach())
    assert loss.dtype == torch.float32
    assert 0 < float(loss.detach()) - plain < 1
    assert len(drive(lnsr, run, 3)) == 3


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "modernbert", "mpnet", "deberta-v2"])
def test_other_families(kind: str) -> None:
    run, reference = make_run(make(kind, HEAD)), make(kind, HEAD)
    batch, lnsr = draw(HEAD, kind), LNSR(layer=0.5, sigma=0.3)
    lnsr.begin(run)
    wanted = by_equation(reference, batch, lnsr, 1, packed=False)
    torch.testing.assert_close(lnsr.loss(run, run.model, batch), wanted, rtol=1e-4, atol=1e-5)
    if kind in ("distilbert", "modernbert"):
        use_packed(run.model)
        run.step = 1
        loss = lnsr.loss(run, run.model, batch)
        assert float((loss - reference(**batch).loss).detach()) > 1e-3


def test_what_cannot_be_is_refused() -> None:
    deberta = make_run(make("deberta-v2", HEAD))
    with pytest.raises(UsageError, match="layer: expected layers that read what the one below"):
        LNSR(layer=0.0).loss(deberta, deberta.model, draw(HEAD, "deberta-v2"))
    run: Any = make_run(model_of())
    run.model.gradient_checkpointing_enable()
    with pytest.raises(UsageError, match="model: expected no gradient checkpointing"):
        LNSR().begin(run)
    with pytest.raises(UsageError, match="method: expected one that trains by the Trainer's loss"):
        SensiCallback("lnsr")
    assert LNSR().needs_eager() is not None


@pytest.mark.parametrize("bad", [{"layer": 1.0}, {"sigma": 0.0}, {"weight": -1.0}])
def test_bad_options(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        method("lnsr", **bad)
