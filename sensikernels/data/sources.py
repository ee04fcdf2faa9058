"""Splits of files, of data sets of the hub and of folders laid out like them, by ``datasets``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from sensikernels._core.errors import DataError, UsageError
from sensikernels._core.files import one_line
from sensikernels.data.tasks import HUB

TRAIN: Final = ("train", "training")
DEV: Final = ("validation", "validation_matched", "dev", "valid", "eval", "test")
"""Names of splits, in order of preference. A test split serves where there is no other."""
_READERS: Final[Mapping[str, tuple[str, dict[str, Any]]]] = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}
SUFFIXES: Final = tuple(_READERS)
_NO_ORGANISATION: Final = "_"


def read_file(path: Path) -> Any:
    """A CSV, TSV, JSON Lines or Parquet file as a ``datasets.Dataset``.

    An empty cell of CSV or TSV is an empty text. Raises UsageError for another suffix, DataError
    for a file that is not there or cannot be read.
    """
    kind, options = _READERS[path.suffix.lower()]
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return _loaded(
        f"{path}", lambda d: d.load_dataset(kind, data_files=str(path), split="train", **options)
    )


def read_hub(name: str) -> tuple[Any, Any, tuple[str, ...]]:
    """Train and dev splits of ``hub:NAME``, and a note of which they are.

    Raises UsageError without ``datasets``, DataError for what is not there or has no such splits.
    """
    place, config = place_of(name.removeprefix(HUB))
    splits = _loaded(name, lambda d: d.load_dataset(place, config))
    train, dev = (choose(splits, wanted, name) for wanted in (TRAIN, DEV))
    return splits[train], splits[dev], (f"splits: {train} trains, {dev} is dev",)


def place_of(name: str) -> tuple[str, str | None]:
    """What ``datasets`` calls the data, and the configuration.

    One part is a name, two are organisation/name, three organisation/name/configuration; for a name
    without organisation and with a configuration the first is ``_``: ``_/glue/sst2``. What begins
    with ``/`` or ``.`` is a folder, or a folder/configuration.
    """
    if name.startswith(("/", ".", "~")):
        path = Path(name).expanduser()
        if path.is_dir():
            return str(path), None
        if path.parent.is_dir():
            return str(path.parent), path.name
        raise DataError(f"{HUB}{name}: no such folder")
    parts = name.split("/")
    if len(parts) > 3 or not all(parts):
        raise UsageError(
            f"task: expected {HUB}NAME, {HUB}ORGANISATION/NAME or {HUB}ORGANISATION/NAME/"
            f"CONFIGURATION ({_NO_ORGANISATION} for no organisation), got {HUB + name!r}"
        )
    config = parts.pop() if len(parts) == 3 else None
    plain = parts[1:] if parts[0] == _NO_ORGANISATION else parts
    return "/".join(plain), config


def choose(splits: Mapping[str, Any], wanted: tuple[str, ...], name: str) -> str:
    """The first of the ``wanted`` splits that there is. Raises DataError listing what there is."""
    for split in wanted:
        if split in splits:
            return split
    raise DataError(
        f"{name}: expected a split {' or '.join(wanted)}, got {', '.join(splits) or 'none'}"
    )


def _loaded(name: str, load: Callable[[Any], Any]) -> Any:
    try:  # optional: its absence is told with what to install
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise UsageError(
            f"{name}: expected the datasets package, got none: pip install 'sensikernels[glue]'"
        ) from error
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return load(datasets)
    except Exception as error:  # offline, not found, or not of its format
        cause = error.__cause__ or error  # the library wraps what a file's reader says
        raise DataError(f"{name}: cannot be read: {one_line(cause)}") from error
    finally:
        if bars:
            datasets.enable_progress_bars()
