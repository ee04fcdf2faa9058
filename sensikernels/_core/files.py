"""Files that are whole or absent, and JSON of strangers read with limits."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sensikernels._core.checks import expected, require
from sensikernels._core.errors import SensiError

JSON_BYTES = 1 << 28
JSON_DEPTH = 64
"""No file of this package's is near either; what is beyond is not one of them."""


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A temporary neighbour of ``target``, renamed to it when the block ends without an error.

    The block makes a file or a folder there; either replaces what is at ``target``. On any error
    it is removed. Raises SensiError where the disk refuses.
    """
    from safetensors import SafetensorError

    temporary = partial_name(target)
    try:
        remove(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        if temporary.is_dir():
            remove(target)
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        remove(temporary)
        reason = getattr(error, "strerror", None) or str(error)
        raise SensiError(f"{target}: cannot be written: {reason}") from error
    except BaseException:
        remove(temporary)
        raise


def partial_name(target: Path) -> Path:
    """The path at which ``target`` is written before it is renamed."""
    return target.with_name(f".{target.name}.tmp")


def write_json(target: Path, content: Any) -> None:
    """Write JSON by renaming."""
    with writing(target) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises OSError if it cannot be read.

    Raises:
        ValueError: it is larger than 256 MiB, no UTF-8, no JSON, nested too deep, names a key
            twice, or holds a number that is not finite.
    """
    with path.open("rb") as file:
        content = file.read(JSON_BYTES + 1)
    if len(content) > JSON_BYTES:
        raise ValueError(f"more than {JSON_BYTES >> 20} MiB of JSON")
    return parse_json(content.decode())


def parse_json(text: str) -> Any:
    """``read_json`` of a text at hand."""
    try:
        content = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_once
        )
    except RecursionError:
        raise ValueError("JSON nested too deep") from None
    _refuse_depth(content)
    return content


def digest_of_json(content: Any) -> str:
    """SHA-256 of a plain value, whatever its layout in a file."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """A plain ``body`` with the digest that ``unsealed`` checks."""
    plain = json.loads(json.dumps(body, allow_nan=False))
    return {**plain, "digest": digest_of_json(plain)}


def unsealed(data: Any, version: int, remedy: str) -> dict[str, Any]:
    """The body of what ``sealed`` made, of ``format`` ``version``.

    Raises:
        ValueError: another format, edited or damaged; it ends with what to do, the ``remedy``.
    """
    if not isinstance(data, dict):
        raise ValueError(f"expected an object, got {type(data).__name__}")
    found = data.get("format")
    if type(found) is not int or found != version:
        raise ValueError(f"format: expected {version}, got {found!r:.40}; {remedy}")
    body = {name: value for name, value in data.items() if name != "digest"}
    if data.get("digest") != digest_of_json(body):
        raise ValueError(f"digest: not that of its content: it was edited or damaged; {remedy}")
    return body


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def require_writable(outputs: Mapping[str, Path], mine: Callable[[Path], object]) -> None:
    """Check that every file of ``outputs``, by argument, can be written, before work starts.

    An existing file may be replaced only if ``mine(path)`` reads it without an error.

    Raises:
        UsageError: two are one file; one is a folder or a stranger's file; its folder cannot be
            made or written to.
    """
    taken: dict[Path, str] = {}
    for argument, path in outputs.items():
        place = path.resolve()
        require(place not in taken, argument, f"another file than {taken.get(place)}'s", path)
        taken[place] = argument
        require(not path.is_dir(), argument, "a file", f"the folder {path}")
        _require_room(argument, path)
        if path.exists():
            _require_mine(argument, path, mine)


def _require_room(argument: str, path: Path) -> None:
    nearest = next(p for p in path.absolute().parents if p.exists())
    require(nearest.is_dir(), argument, "a path below a folder", f"{path}: {nearest} is a file")
    usable = os.access(nearest, os.W_OK | os.X_OK)
    require(usable, argument, "a folder that can be written to", nearest)


def _require_mine(argument: str, path: Path, mine: Callable[[Path], object]) -> None:
    try:
        mine(path)
    except (SensiError, OSError, ValueError) as error:
        got = f"{path}, which exists and is another's"
        raise expected(argument, "a new file", got) from error


def one_line(error: object) -> str:
    """The message of an error on one line of bounded length."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def nobody(path: Path) -> None:
    """For ``require_writable``: every existing file is a stranger's."""
    raise ValueError(f"{path} exists")


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _refuse_depth(content: Any) -> None:
    level = [content]
    for _ in range(JSON_DEPTH):
        inner = [one for one in level if isinstance(one, (dict, list))]
        if not inner:
            return
        level = [x for one in inner for x in (one.values() if isinstance(one, dict) else one)]
    raise ValueError("JSON nested too deep")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is named twice")
    return made


def _sync(path: Path) -> None:
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
