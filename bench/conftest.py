"""Options of the pytest-benchmark files."""

from __future__ import annotations

import pytest
import torch

from bench.contest import COMPILED


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    parser.addoption("--compiled", action="store_true", help="torch.compile of the baselines too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--compiled"):
        skip = pytest.mark.skip(reason="compiles for seconds: give --compiled")
        for item in items:
            if item.name.endswith(f"{COMPILED}]"):
                item.add_marker(skip)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return name
