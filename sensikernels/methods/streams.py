"""Random numbers that follow from a run's seed and step, not from what was drawn before."""

from __future__ import annotations

import numpy as np
import torch


def stream(device: torch.device, *numbers: int) -> torch.Generator:
    """A generator on ``device`` that these numbers together seed: seed, step, process, …"""
    words = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0] >> 1))
