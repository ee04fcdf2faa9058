"""The L2's read rate and a launch's cost on a GPU."""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHUNK, PASSES = 4096, 64


@triton.jit
def read_again(source, out, chunks, PASSES: tl.constexpr, CHUNK: tl.constexpr):
    """Sum ``chunks`` of CHUNK floats PASSES times; each pass starts elsewhere, past the L1."""
    first = tl.program_id(0)
    step = tl.num_programs(0)
    inside = tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float32)
    for turn in range(PASSES):
        for chunk in range(first, chunks, step):
            at = (chunk + turn * 31) % chunks
            total += tl.load(source + at * CHUNK + inside, cache_modifier=".cg")
    tl.store(out + first, tl.sum(total))


@triton.jit
def nothing(out):
    """A kernel that does nothing, to time its launch."""
    tl.store(out, 0.0)


class L2Reader:
    """Reads ``bytes_read`` from a buffer that stays in the L2."""

    def __init__(self, mebibytes: int, device: str = "cuda") -> None:
        self._chunks = (mebibytes << 20) // 4 // CHUNK
        self._source = torch.ones(self._chunks * CHUNK, device=device)
        count = torch.cuda.get_device_properties(device).multi_processor_count
        self._grid = (4 * count,)
        self._out = torch.empty(self._grid, device=device)
        self.bytes_read = 4 * CHUNK * self._chunks * PASSES

    def __call__(self) -> None:
        read_again[self._grid](
            self._source, self._out, self._chunks, PASSES=PASSES, CHUNK=CHUNK, num_warps=8
        )

    def right(self) -> bool:
        """Every entry was read ``PASSES`` times."""
        self()
        return int(self._out.double().sum()) == CHUNK * self._chunks * PASSES


def launch(out: torch.Tensor) -> None:
    """One launch of an empty kernel."""
    nothing[(1,)](out)
