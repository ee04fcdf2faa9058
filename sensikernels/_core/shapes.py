"""How far the sizes of a batch are rounded up, so that shapes repeat."""

from __future__ import annotations

from typing import Final

MULTIPLE: Final = 32
"""Packed token counts are multiples of this: each is compiled for once, all tokens are computed."""

GRAPHED: Final = 64
"""The same where each is captured as a CUDA graph, which costs more than a part of a tile."""


def token_multiple(device: str) -> int:
    """What packed token counts are rounded up to on this type of device."""
    return GRAPHED if device == "cuda" else MULTIPLE
