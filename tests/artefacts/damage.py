"""Ways to spoil a file: bytes cut, flipped and exchanged, JSON values of every wrong kind."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEEP = 100_000
BAD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    -0.5,
    1e308,
    10**30,
    "",
    "x",
    "../../../etc/passwd",
    "/etc/passwd",
    "a\nb",
    [],
    {},
    [None],
    {"x": 1},
    float("nan"),
    float("inf"),
    "\ud800",
)
Place = tuple[Any, ...]


def cuts(content: bytes) -> Iterator[tuple[str, bytes]]:
    """The content truncated, extended and exchanged."""
    size = len(content)
    for length in sorted({0, 1, 7, 8, 9, 64, size // 4, size // 2, size - 9, size - 1}):
        if 0 <= length < size:
            yield f"cut to {length}", content[:length]
    yield "a zero behind", content + b"\0"
    yield "twice", content * 2
    yield "zeros", b"\0" * size
    yield "a list", b"[]\n"
    yield "a number", b"7\n"
    yield "no UTF-8", b"\xff\xfe" + content
    yield "deep", b"[" * DEEP + b"]" * DEEP
    yield "deep object", b'{"a":' * DEEP + b"1" + b"}" * DEEP
    yield "a huge header", (1 << 62).to_bytes(8, "little") + content[8:]
    yield "a negative header", b"\xff" * 8 + content[8:]


def flips(content: bytes, count: int, within: int | None = None) -> Iterator[tuple[str, bytes]]:
    """One bit flipped, at ``count`` places evenly over the first ``within`` bytes and the last."""
    size = min(within or len(content), len(content))
    rng = random.Random(0)
    places = {i * (size - 1) // max(count - 1, 1) for i in range(count)}
    for place in sorted(places | ({len(content) - 1} if within is None else set())):
        bit = rng.randrange(8)
        spoiled = bytearray(content)
        spoiled[place] ^= 1 << bit
        yield f"bit {bit} of byte {place}", bytes(spoiled)


def fields(tree: Any, at: Place = ()) -> Iterator[Place]:
    """Every place of a JSON tree; of a long list the first, the second and the last."""
    if at:
        yield at
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from fields(value, (*at, name))
    elif isinstance(tree, list):
        for index in sorted({0, 1, len(tree) - 1}):
            if 0 <= index < len(tree):
                yield from fields(tree[index], (*at, index))


def values(tree: Any, per_field: int, seed: int = 0) -> Iterator[tuple[str, Any]]:
    """The tree with a field of a bad value (``per_field`` of them, in turn), or without it."""
    rng = random.Random(seed)
    known: set[Place] = set()
    for place in fields(tree):
        kind = tuple("#" if isinstance(part, int) else part for part in place)
        if kind in known:
            continue
        known.add(kind)
        for bad in rng.sample(BAD, per_field):
            yield (
                f"{place} = {bad!r:.20}",
                _changed(tree, place, lambda holder, key, b=bad: holder.__setitem__(key, b)),
            )
        yield f"{place} removed", _changed(tree, place, lambda holder, key: holder.__delitem__(key))
    if isinstance(tree, dict):
        yield "a field more", {**tree, "more": 1}


def text_of(tree: Any) -> bytes:
    """JSON as Python writes it, NaN and half a surrogate included."""
    return json.dumps(tree).encode()


def doubled(text: str) -> Iterator[tuple[str, str]]:
    """The text of a JSON object with each of its outer fields named twice."""
    for name, value in json.loads(text).items():
        pair = f"{json.dumps(name)}: {json.dumps(value)}"
        yield f"{name} twice", text.rstrip()[:-1] + ", " + pair + "}"


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` with its content."""
    return {
        str(Path(root, name)): Path(root, name).read_bytes()
        for root, _, names in os.walk(folder)
        for name in names
    }


def _changed(tree: Any, place: Place, change: Any) -> Any:
    spoiled = copy.deepcopy(tree)
    holder = spoiled
    for part in place[:-1]:
        holder = holder[part]
    change(holder, place[-1])
    return spoiled
