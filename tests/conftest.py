"""Fixtures of the whole suite: seeds, poisoned memory, and which process a test belongs to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    max_examples=50,
    database=None,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.load_profile("suite")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--glue-data", metavar="DIR", help="folder that holds SST-2/, MRPC/, …")
    parser.addoption("--squad-data", metavar="DIR", help="folder of SQuAD's train.json, dev.json")
    parser.addoption("--ner-data", metavar="DIR", help="folder of WNUT 17's train and dev.conll")
    parser.addoption("--model-packages", metavar="DIR", help="where sapiens and rxnmapper lie")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "interpret" in item.keywords and not INTERPRETING:
            item.add_marker(pytest.mark.skip(reason="needs its own process, TRITON_INTERPRET=1"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def torchs_settings_stay() -> Iterator[None]:
    """What is run puts back the settings of torch that it changes for itself."""

    def settings() -> tuple[Any, ...]:
        return (
            torch.get_float32_matmul_precision(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
        )

    before = settings()
    yield
    after = settings()
    torch.set_float32_matmul_precision(before[0])
    torch.set_default_dtype(before[1])
    torch.set_grad_enabled(before[2])
    assert after == before


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory is NaN (integers: the largest) until written, whoever allocates it, C++ included."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
