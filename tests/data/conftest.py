"""Small made-up files of every task, and real ones where ``--glue-data DIR`` names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sensikernels.data.tasks import TASKS, Task
from tests.data.corpora import letters_tokenizer
from tests.data.layout import GLUE


def real(request: pytest.FixtureRequest, option: str) -> Path:
    """The folder that an option of the command line names; the test is skipped without one."""
    given = request.config.getoption(option, default=None)
    if given is None:
        pytest.skip(f"no real data: give {option} DIR")
    return Path(given)


@pytest.fixture
def glue_data_dir(request: pytest.FixtureRequest) -> Path:
    """The folder of real GLUE files."""
    return real(request, "--glue-data")


@pytest.fixture
def squad_data_dir(request: pytest.FixtureRequest) -> Path:
    """The folder of real SQuAD files."""
    return real(request, "--squad-data")


@pytest.fixture
def ner_data_dir(request: pytest.FixtureRequest) -> Path:
    """The folder of WNUT 17's files."""
    return real(request, "--ner-data")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A BERT tokenizer of a few words and of all letters as pieces."""
    return letters_tokenizer()


@pytest.fixture(params=GLUE)
def glue_task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]
