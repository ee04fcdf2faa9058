"""DPS Mix: the mixed weights, their draws and scores, and that nothing but the step sees them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sensikernels._core.bits import unpack_bits
from sensikernels._core.errors import UsageError
from sensikernels.hf import use_packed
from sensikernels.masks import Geometry
from sensikernels.methods import DPS, Run
from sensikernels.methods.dps import kept_count, matrices
from sensikernels.methods.dps_mix import Mix, mixed
from sensikernels.methods.streams import stream
from sensikernels.optim import SubsetAdamW
from tests.hf.conftest import make_batch, make_model
from tests.hf.families import draw, make

LENGTH = 3  # steps of a stage: 24 · 0.125


def make_run(model: nn.Module | None = None, *, kind: Any = SubsetAdamW) -> Run:
    model = make_model() if model is None else model
    optimizer = kind(model.parameters(), lr=1e-2)
    return Run(
        model=model,
        optimizer=optimizer,
        max_steps=24,
        batches=lambda: [],
        geometry=Geometry.uniform(9),
        seed=7,
    )


def mix(**options: Any) -> DPS:
    return DPS(variant="mix", update_ratio=0.125, masked_share=0.25, **options)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in matrices(model).items()}


def step(method: DPS, run: Run, index: int, batch: Any = None) -> None:
    run.step = index
    method.begin_step(run)
    run.model(**(make_batch(seed=index) if batch is None else batch)).loss.backward()
    method.before_step(run)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def by_hand(w: torch.Tensor, t: torch.Tensor, m: torch.Tensor, p: float) -> torch.Tensor:
    w, t, m = w.double(), t.double(), m.double()
    return ((1 - m) * t + m * w - p * t) / (1 - p)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 0.9), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_mixing_is_the_papers_and_the_weight_on_average(
    p: float, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, t = (torch.randn(3, 5, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(5, generator=generator) < 0.5
    got = mixed(w, t, mask, p)
    rtol, atol = (2e-2, 5e-2) if dtype is torch.bfloat16 else (1e-5, 1e-4)
    torch.testing.assert_close(got.double(), by_hand(w, t, mask, p), rtol=rtol, atol=atol)
    on, off = (mixed(w.double(), t.double(), torch.tensor(one), p) for one in (True, False))
    torch.testing.assert_close((1 - p) * on + p * off, w.double())


@pytest.mark.parametrize("length", [49, 50])
def test_scores_are_per_draw_and_favour_rare_columns_in_long_stages(length: int) -> None:
    seen, sums = torch.tensor([0.0, 1.0, 10.0]), torch.rand(2, 3)
    got = Mix(share=0.3, seen={"w": seen}).scores("w", sums, length)
    want = sums / torch.tensor([1.0, 1.0, 10.0])
    if length == 50:
        want = want * torch.tensor([1.0, np.exp(-1 / 50), np.exp(-10 / 50)])
    torch.testing.assert_close(got, want.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("published", [False, True])
def test_two_stages_against_the_equations(published: bool, dtype: torch.dtype) -> None:
    run, method = make_run(make_model().to(dtype)), mix(as_published=published)
    method.begin(run)
    first, raw, p = values(run.model), values(run.model), 0.25
    sums = {n: torch.zeros(w.shape) for n, w in first.items()}
    seen = {n: torch.zeros(w.shape[1]) for n, w in first.items()}
    for index in range(LENGTH):
        run.step = index
        method.begin_step(run)
        generator = stream(torch.device("cpu"), run.seed, run.step)
        columns = {n: torch.rand(w.shape[1], generator=generator) >= p for n, w in first.items()}
        for name, weight in matrices(run.model).items():
            want = by_hand(raw[name], first[name], columns[name], p)
            assert torch.equal(weight, mixed(raw[name], first[name], columns[name], p))
            loose = 1e-5 if dtype is torch.float32 else 5e-2
            torch.testing.assert_close(weight.double(), want, rtol=loose, atol=loose)
        run.model(**make_batch(seed=index)).loss.backward()
        grads = {n: w.grad.clone() for n, w in matrices(run.model).items()}  # type: ignore[union-attr]
        method.before_step(run)
        for name, weight in matrices(run.model).items():
            masked = grads[name] * columns[name]
            assert torch.equal(weight, raw[name])
            assert torch.equal(weight.grad, masked)  # type: ignore[arg-type]
            sums[name] += masked.float().square() / 1000
            seen[name] += columns[name]
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        raw = values(run.model)
    run.step = LENGTH
    method.begin_step(run)
    for name, weight in matrices(run.model).items():
        scores = (sums[name] / seen[name].clamp(min=1)).flatten()
        kept = torch.zeros(scores.numel(), dtype=torch.bool)
        order = scores.argsort(descending=True, stable=True)
        kept[order[: kept_count(scores.numel(), p)]] = True
        got = unpack_bits(method.state()[f"kept.{name}"], kept.numel())
        assert torch.equal(got, kept)
        assert torch.equal(weight, raw[name])  # it begins as its own target
    step(method, run, LENGTH)
    now = values(run.model)
    run.step = LENGTH + 1
    method.begin_step(run)
    for name, weight in matrices(run.model).items():
        kept = unpack_bits(method.state()[f"kept.{name}"], weight.numel()).view(weight.shape)
        amplified = mixed(now[name], raw[name], kept, p)
        assert torch.equal(weight, amplified if published else now[name])
        assert torch.equal(now[name][~kept], raw[name][~kept]) != published
    assert run.plan is not None
    assert run.plan.origin["step"] == LENGTH
    for index in range(LENGTH + 1, 2 * LENGTH + 1):
        step(method, run, index)
    assert {key.split(".")[0] for key in method.state()} == {"sum", "start", "seen"}
    counts = [value for key, value in method.state().items() if key.startswith("seen.")]
    assert all(float(count.max()) <= 1 for count in counts)  # of this stage alone


def test_columns_follow_from_the_step_and_the_seed() -> None:
    weights = matrices(make_model())
    run = make_run()

    def drawn() -> torch.Tensor:
        return torch.cat(list(Mix(share=0.3).draw(run, weights).values()))

    one, again = drawn(), drawn()
    run.step = 1
    other = drawn()
    run.seed, run.step = 8, 0
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, drawn())
    many = Mix(share=0.3).draw(run, {"w": nn.Parameter(torch.empty(1, 20_000))})["w"]
    assert float(many.float().mean()) == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_forward_and_backward_compute_with_the_mixed_weights(packed: bool, narrow: bool) -> None:
    run, method = make_run(), mix()
    if packed:
        use_packed(run.model)
    method.begin(run)
    step(method, run, 0)
    run.step = 1
    run.model(**make_batch()).loss  # noqa: B018  a pass with raw weights leaves nothing behind
    method.begin_step(run)
    twin = copy.deepcopy(run.model)
    method.before_step(run)  # raw again, so that a copy's are its own
    method.begin_step(run)
    for module in (run.model, twin):
        for seed in (0, 1):  # two batches accumulate
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                loss = module(**make_batch(seed=seed)).loss
            loss.backward()
    named = dict(twin.named_parameters())
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter.grad, named[name].grad), name  # type: ignore[arg-type]


def evaluate(model: nn.Module) -> None:
    model.eval()
    model(**make_batch())


def save(model: nn.Module) -> None:
    model.state_dict()


@pytest.mark.parametrize("look", [evaluate, save])
def test_evaluations_and_state_dicts_see_raw_weights_alone(look: Any) -> None:
    run, method = make_run(), mix()
    method.begin(run)
    step(method, run, 0)
    raw = values(run.model)

    def is_raw() -> bool:
        return all(torch.equal(w, raw[n]) for n, w in matrices(run.model).items())

    run.step = 1
    method.begin_step(run)
    assert not is_raw()
    look(run.model)  # the step ended without before_step, as where fp16 overflows
    assert is_raw()
    run.model.train()
    for _ in range(2):
        method.begin_step(run)
    method.end(run)
    assert is_raw()
    assert not run.model._forward_pre_hooks
    assert not run.model._state_dict_pre_hooks


def test_an_overflow_at_the_start_of_a_stage_puts_its_turn_off_by_a_step() -> None:
    run, method = make_run(), DPS(update_ratio=0.125)
    method.begin(run)
    for index in (0, 1, 2, 4):  # 3 is left out: the first of stage 2
        step(method, run, index)
    assert {key.split(".")[0] for key in method.state()} == {"kept"}
    step(method, run, 7)  # and 5, 6: the first of the next stage 1
    assert {key.split(".")[0] for key in method.state()} == {"sum"}


@pytest.mark.parametrize("at", [2, 5])
@pytest.mark.parametrize("published", [False, True])
def test_resumes_to_the_same_bits(published: bool, at: int) -> None:
    run, method = make_run(), mix(as_published=published)
    method.begin(run)
    for index in range(8):
        if index == at:
            saved = copy.deepcopy(
                [method.state(), run.model.state_dict(), run.optimizer.state_dict()]
            )
            plan = run.plan
        step(method, run, index)
    again, other = make_run(), mix(as_published=published)
    again.step, again.plan = at, plan
    other.resume(again, saved[0])
    again.model.load_state_dict(saved[1])
    again.optimizer.load_state_dict(saved[2])
    for index in range(at, 8):
        step(other, again, index)
    for one, two in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["distilbert", "modernbert"])
def test_other_families(kind: str) -> None:
    head = "ForSequenceClassification"
    run, method = make_run(make(kind, head)), mix()
    method.begin(run)
    before = values(run.model)
    for index in range(5):
        step(method, run, index, draw(head, kind))
    now = values(run.model)
    assert all(not torch.equal(now[name], before[name]) for name in before)


def test_inside_a_trainer(tmp_path: Path) -> None:
    from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

    from sensikernels.hf import load_model, load_tokenizer
    from sensikernels.training import SensiCallback
    from tests.training.tiny import save_tiny, trainer_rows

    tiny = save_tiny(tmp_path / "tiny")
    tokenizer, model = load_tokenizer(tiny), load_model(tiny, labels=2)
    rows = trainer_rows(tokenizer, 32)
    stepped: list[dict[str, torch.Tensor]] = []
    evaluated: list[bool] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            stepped.append(values(model))

        def on_evaluate(self, *_: Any, **__: Any) -> None:
            now = values(model)
            evaluated.append(all(torch.equal(now[n], w) for n, w in stepped[-1].items()))

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
    )
    watched = SensiCallback(
        "dps", variant="mix", update_ratio=0.25, as_published=True, ranking_rows=32
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows[:8],
        callbacks=[watched, Watch()],
        data_collator=DataCollatorWithPadding(tokenizer),
        optimizers=(torch.optim.AdamW(model.parameters(), lr=1e-3), None),
    ).train()
    assert evaluated == [True] * 8
    assert watched.plan is not None
    assert all(not torch.equal(stepped[0][n], w) for n, w in stepped[-1].items())


def test_a_variant_must_be_known() -> None:
    with pytest.raises(UsageError, match="variant: expected one of dense, mix, got 'reg'"):
        DPS(variant="reg")
