"""Small made-up files of every task, and real ones where ``--glue-data DIR`` names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sensikernels.data.tasks import TASKS, Task
from tests.data.layout import GLUE


@pytest.fixture
def glue_data_dir(request: pytest.FixtureRequest) -> Path:
    """The folder of real GLUE files; the test is skipped without one."""
    given = request.config.getoption("--glue-data", default=None)
    if given is None:
        pytest.skip("no real data: give --glue-data DIR")
    return Path(given)


@pytest.fixture(params=GLUE)
def glue_task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]
