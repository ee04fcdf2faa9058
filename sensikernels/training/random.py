"""Random streams: the state of torch's generators on the CPU and on a device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def seeded(seed: int, device: torch.device, rank: int, step: int = 0) -> dict[str, Tensor]:
    """The state of a process's fresh stream on CPU and device; ``step``: where it joins."""
    if rank > 0:
        words = np.random.SeedSequence((seed, rank, step)).generate_state(1, np.uint64)
        seed = int(words[0] >> 1)
    state = {"cpu": torch.Generator().manual_seed(seed).get_state()}
    if device.type == "cuda":
        state["cuda"] = torch.Generator(device).manual_seed(seed).get_state()
    return state


def get_random(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators now."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put torch's generators into a state."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
