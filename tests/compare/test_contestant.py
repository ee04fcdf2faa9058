"""What a comparison's contestants are called, and the runs that serve them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sensikernels._core.errors import UsageError
from sensikernels.compare.contestant import contestant, contestants
from sensikernels.compare.runs import entries
from sensikernels.masks import Budget
from sensikernels.training import Settings

COMMON = Settings(task="demo", method="dense", output=Path("out"), epochs=3, seed=7)


def test_a_method_with_everything() -> None:
    one = contestant("sensi-bert@0.25/7.5:ranking=random:warmup=0.2")
    assert (one.method, one.share, one.epochs) == ("sensi-bert", 0.25, 7.5)
    assert one.options == {"ranking": "random", "warmup": 0.2}
    made = one.settings(COMMON, {"planned": 1e-3})
    assert (made.budget, made.epochs, made.lr, made.seed) == (Budget(flops=0.25), 7.5, 1e-3, 7)
    assert (made.dense_lr, made.compare_dense) == (None, False)
    assert contestant("bitfit").settings(COMMON, {"planned": 1e-3}).epochs == 3


def test_a_rate_that_is_given() -> None:
    one = contestant("lora/4:rank=4:lr=3e-3")
    assert (one.rate, one.default_rate, one.options) == (3e-3, 3e-3, {"rank": 4})
    assert contestant("hf/2:lr=1e-4").run == "dense/2:lr=1e-4"
    assert contestant("lora").default_rate == 3e-4


def test_the_stock_model_trains_beside_ours() -> None:
    asked = contestants(["hf", "sensi-bert@0.5", "dense", "hf/5", "dense/2"])
    served = {
        entry.name: {side: one.text for side, one in entry.sides.items()}
        for entry in entries(asked)
    }
    assert served == {
        "dense": {"dense": "hf", "planned": "dense"},
        "sensi-bert@0.5": {"planned": "sensi-bert@0.5"},
        "dense/5": {"dense": "hf/5"},
        "dense/2": {"planned": "dense/2"},
    }
    both = entries(asked)[0].first.settings(COMMON, {"dense": 2e-5, "planned": 1e-4})
    assert (both.method, both.lr, both.dense_lr, both.compare_dense) == ("dense", 1e-4, 2e-5, True)
    lone = entries(asked)[2].first.settings(COMMON, {"dense": 2e-5})
    assert (lone.epochs, lone.lr, lone.dense_lr, lone.compare_dense) == (5, 2e-5, 2e-5, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected METHOD"),
        ("dense@", "expected METHOD"),
        ("sensi-bert@0.5//2", "expected METHOD"),
        ("nothing", "expected one of hf, "),
        ("sensi-bert", "expected sensi-bert@SHARE"),
        ("bitfit@0.5", "expected bitfit without a share"),
        ("sensi-bert@1.5", "expected a share of the FLOPs above 0 and at most 1"),
        ("sensi-bert@0.5.5", "expected a share of the FLOPs above 0 and at most 1"),
        ("dense/0", "expected epochs above 0"),
        ("hf@0.5", "expected hf without share and options"),
        ("bitfit:colour=red", "bitfit takes subsets; got 'colour'"),
        ("bitfit:lr=fast", "expected one learning rate above 0"),
        ("bitfit:lr=0", "expected one learning rate above 0"),
        ("bitfit:lr=1e-3:lr=1e-4", "expected one learning rate above 0"),
    ],
)
def test_what_is_none_is_refused(text: str, expected: str) -> None:
    with pytest.raises(UsageError, match=r"^method") as error:
        contestant(text)
    assert expected in str(error.value)


def test_contestants_are_some_and_each_once() -> None:
    with pytest.raises(UsageError, match="^methods: expected at least one, got none"):
        contestants([])
    with pytest.raises(UsageError, match=r"^methods: expected each once, got \['dense'\]"):
        contestants(["dense", "bitfit", "dense"])
    with pytest.raises(UsageError, match=r"^methods: expected each once, got \['dense'\]"):
        contestants(["dense"], ["dense"])
    assert [one.once for one in contestants(["dense"], ["bitfit"])] == [False, True]
