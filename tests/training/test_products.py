"""The precision of float32 products inside a run, and after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sensikernels._core.products import fastest, float32_products, medium_rounds, precision
from sensikernels.masks import Budget
from sensikernels.training import Settings, finetune
from sensikernels.training.loop import rank, step_costs


def error() -> float:
    """Of a product as large as a layer's, relative."""
    x, w = torch.randn(512, 256), torch.randn(256, 256)
    wanted = x.double() @ w.double()
    return float((x @ w - wanted).norm() / wanted.norm())


def test_a_run_on_a_cpu_loses_no_digit() -> None:
    with float32_products("cpu"):
        assert error() < 2e-6  # bfloat16 would make it 2e-3
    with precision("medium"):
        assert (error() > 1e-4) == medium_rounds()
    assert fastest("cpu") == ("highest" if medium_rounds() else "medium")
    assert fastest("cuda") == "high"


def test_it_is_put_back_whatever_happens_and_a_users_is_kept() -> None:
    def fail() -> None:
        with float32_products("cuda"):
            assert torch.get_float32_matmul_precision() == "high"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_float32_matmul_precision() == "highest"
    with precision("medium"):
        for device in ("cpu", "cuda"):
            with float32_products(device):
                assert torch.get_float32_matmul_precision() == "medium"


def test_runs_put_it_back(tiny: Path, tmp_path: Path) -> None:
    made = Settings(
        task="demo",
        model=str(tiny),
        output=tmp_path / "out",
        method="sensi-bert",
        budget=Budget(flops=0.6),
        max_train_samples=32,
        ranking_rows=32,
        device="cpu",
    )
    runs: list[Callable[[], object]] = [
        lambda: rank(made),
        lambda: step_costs(made, lambda line: None),
    ]
    for run in runs:
        run()
        assert torch.get_float32_matmul_precision() == "highest"
    report = finetune(made)
    assert report["numerics"]["float32_matmul_precision"] == fastest("cpu")
    assert torch.get_float32_matmul_precision() == "highest"
