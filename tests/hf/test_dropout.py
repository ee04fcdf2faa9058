"""Counter dropout in a BERT: the same model without dropout, the same loss on average with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sensikernels._core.errors import UsageError
from sensikernels.hf import (
    apply,
    compact,
    restore_dropout,
    sensitivity,
    training_flops,
    use_counter_dropout,
)
from sensikernels.masks import Budget, plan
from sensikernels.nn import CounterDropout
from tests.hf.conftest import make_batch, make_model
from tests.hf.packed_cases import same_on_average


def test_without_dropout_nothing_changes(task: str) -> None:
    model, batch = make_model(task, dropout=0.1).double().eval(), make_batch(task)
    wanted = model(**batch)[1]
    names = use_counter_dropout(model)
    assert len(names) >= 7
    torch.testing.assert_close(model(**batch)[1], wanted)
    restore_dropout(model)
    assert not any(isinstance(m, CounterDropout) for m in model.modules())
    assert torch.equal(model(**batch)[1], wanted)


def test_attention_masks_padding_when_training() -> None:
    model = make_model(dropout=1e-9).double()
    batch = make_batch()
    model.config.attention_probs_dropout_prob = 1e-9
    wanted = model.eval()(**batch).logits
    use_counter_dropout(model.train())
    torch.testing.assert_close(model(**batch).logits, wanted)


def test_loss_is_the_same_on_average() -> None:
    model, batch = make_model(dropout=0.1).train(), make_batch(rows=16)
    same_on_average(model, batch, use_counter_dropout)


def test_works_with_a_plan_and_counts_the_same_flops() -> None:
    model, batch = make_model(dropout=0.1), make_batch()
    flops = training_flops(model, batch)
    use_counter_dropout(model)
    assert training_flops(model, batch) == flops
    small = {"neurons": 4}
    apply(
        model, plan(sensitivity(model, [batch]), Budget(flops=0.5), minimums=small, multiples=small)
    )
    model(**batch).loss.backward()
    done = compact(model)
    assert done.config._attn_implementation != "sensikernels"
    assert not any(isinstance(m, CounterDropout) for m in done.modules())
    torch.testing.assert_close(done.eval()(**batch).logits, model.eval()(**batch).logits)


def test_twice_is_refused() -> None:
    model: nn.Module = make_model()
    with pytest.raises(UsageError, match="expected counter dropout in use"):
        restore_dropout(model)
    use_counter_dropout(model)
    with pytest.raises(UsageError, match="already in use"):
        use_counter_dropout(model)
