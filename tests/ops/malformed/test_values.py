"""Values that are checked: on a CPU all, on a device those that are asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sensikernels._core import environment
from sensikernels._core import values as checked
from sensikernels._core.errors import UsageError


@given(
    st.lists(st.integers(-5, 12), max_size=40),
    st.sampled_from([torch.int32, torch.int64, torch.int16]),
    st.booleans(),
)
def test_the_first_wrong_place_is_found(values: list[int], dtype: torch.dtype, ascending: bool):
    index = torch.tensor(values, dtype=dtype)
    inside = [0 <= v < 9 for v in values]
    rises = [i == 0 or v > values[i - 1] for i, v in enumerate(values)]
    wrong = [i for i, ok in enumerate(inside) if not (ok and (rises[i] or not ascending))]
    if not wrong:
        checked.require_within(index, "index", 9, ascending=ascending)
        return
    with pytest.raises(UsageError, match=rf"got indices with {values[wrong[0]]} at {wrong[0]}$"):
        checked.require_within(index, "index", 9, ascending=ascending)


def test_a_device_is_waited_for_only_when_asked(monkeypatch: pytest.MonkeyPatch):
    class Elsewhere:
        """A stand-in for a tensor on a GPU."""

        is_cpu, is_meta = False, False

    monkeypatch.setattr(checked, "_PLAIN", (Elsewhere,))
    assert not checked.readable(Elsewhere())  # type: ignore[arg-type]
    monkeypatch.setattr(environment, "_CHECK", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not checked.readable(Elsewhere())  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert checked.readable(Elsewhere())  # type: ignore[arg-type]
    monkeypatch.setattr(environment, "_CHECK", "yes")
    with pytest.raises(UsageError, match="SENSIKERNELS_CHECK: expected one of 0, 1, got 'yes'"):
        environment.checks_values()


def test_meta_tensors_have_no_values():
    assert checked.readable(torch.tensor([1]))
    assert not checked.readable(torch.tensor([1], device="meta"))
