"""Options with which each method shows what it does in a run of a dozen steps."""

from __future__ import annotations

from typing import Any

OPTIONS: dict[str, dict[str, Any]] = {
    "freeze": {"share": 0.5},
    "dps": {"update_ratio": 0.25},
    "sensi-bert": {"warmup": 0.35},
}
