"""Facts and rules of a launch: device, precision, configuration, descriptors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sensikernels._core import environment

INTERPRET = environment.interpreting()
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS, BULK, ONE = ("sm_80", "sm_90", "gfx942"), ("sm_90", "sm_100"), ("sm_90",)
SPLIT_TOKENS = 512
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One shipped way to compile a kernel: tile sizes and how they are run."""

    tile: Mapping[str, int]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """``128x64x32``, then warps and stages."""
        sizes = "x".join(str(size) for size in self.tile.values())
        return f"{sizes}-w{self.warps}-s{self.stages}"

    @property
    def sums_per_thread(self) -> int:
        """float32 sums a thread holds: the product of the first two sizes over the threads."""
        first, second, *_ = self.tile.values()
        return first * second // (32 * self.warps)

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {**self.tile, "num_warps": self.warps, "num_stages": self.stages}


class Device(NamedTuple):
    """The facts of a device that launches depend on."""

    processors: int
    shared: int
    descriptors: bool


@cache
def _cuda(index: int) -> Device:
    facts = torch.cuda.get_device_properties(index)
    shared = getattr(facts, "shared_memory_per_block_optin", 64 << 10)
    bulk = torch.version.hip is None and facts.major >= 9
    return Device(facts.multi_processor_count, shared, bulk)


def device(x: Tensor) -> Device:
    """The device of ``x``; the interpreter's is small, so that persistent loops go round."""
    return _cuda(x.device.index) if x.is_cuda else INTERPRETED


INTERPRETED = Device(processors=3, shared=227 << 10, descriptors=False)


def processors(x: Tensor) -> int:
    """Multiprocessors of the device of ``x``."""
    return device(x).processors


def programs(x: Tensor, config: Config) -> int:
    """Programs of a persistent grid: as many as are resident, two where blocks are small."""
    return processors(x) * (2 if config.warps <= 4 else 1)


def fit(config: Config, stage_bytes: Callable[[Mapping[str, int], int], int], x: Tensor) -> Config:
    """``config`` with no more stages than the device's shared memory holds.

    Before Hopper one stage of the pipeline is in registers.
    """
    own = device(x)
    most = own.shared // stage_bytes(config.tile, x.element_size()) + (not own.descriptors)
    return config if most >= config.stages else replace(config, stages=max(most, 2))


def on_its_device(launcher: Callable[..., Result]) -> Callable[..., Result]:
    """Launch on the device of the first tensor, whichever is current."""

    @wraps(launcher)
    def run(first: Any, *rest: Any, **named: Any) -> Result:
        x = first
        while not isinstance(x, Tensor):
            x = x[0]
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return launcher(first, *rest, **named)
        with torch.cuda.device(x.device):
            return launcher(first, *rest, **named)

    return run


def split_tokens(items: int, tokens: int, step: int, x: Tensor) -> tuple[int, int]:
    """``(splits, tokens of each)``: enough work for the device, at least 512 tokens a piece."""
    wanted = min(triton.cdiv(2 * processors(x), items), max(tokens // SPLIT_TOKENS, 1))
    each = triton.cdiv(triton.cdiv(tokens, wanted), step) * step
    return triton.cdiv(tokens, each), each


def split(size: int, step: int, most: int) -> tuple[int, int]:
    """``(chunks, entries of each)``: at most ``most`` chunks of whole steps of ``step`` entries."""
    steps = triton.cdiv(size, step)
    each = triton.cdiv(steps, min(steps, most)) * step
    return triton.cdiv(size, each), each


def can_describe(*matrices: Tensor) -> bool:
    """Bulk copies by descriptor serve these: Hopper or later, 16-byte rows and addresses."""
    return device(matrices[0]).descriptors and all(describable(m) for m in matrices)


def describable(m: Tensor) -> bool:
    """Rows and the first address are multiples of 16 bytes, and there is something to read."""
    pitch = m.stride(0) * m.element_size()
    rows = m.stride(-1) == 1 and m.stride(0) >= m.shape[1] and pitch % 16 == 0
    return bool(m.numel() and rows and m.data_ptr() % 16 == 0)


def describe(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of tiles of a matrix; it travels as a kernel argument, so graphs capture it."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def precision(dtype: torch.dtype) -> str:
    """The precision of float32 products, by torch's own setting of matmul precision."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def upcast(dtype: torch.dtype) -> bool:
    """The interpreter keeps bfloat16 as raw integers, so products must be taken wider."""
    return INTERPRET and dtype == torch.bfloat16


def matrix(x: Tensor) -> Tensor:
    """``x`` with unit column stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def readable(x: Tensor) -> int:
    """Columns of ``x`` that may be read: the padding of its rows too, where memory has it."""
    end = (x.storage_offset() + x.shape[0] * x.stride(0)) * x.element_size()
    padded = x.stride(0) >= x.shape[1] and end <= x.untyped_storage().nbytes()
    return x.stride(0) if padded else x.shape[1]


def tile_of(size: int, largest: int = 128) -> int:
    """Smallest tile a dot takes (a power of two, at least 16) for ``size``, up to ``largest``."""
    return min(max(triton.next_power_of_2(size), 16), largest)
