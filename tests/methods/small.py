"""Options with which each method shows what it does in a run of a dozen steps."""

from __future__ import annotations

from typing import Any

OPTIONS: dict[str, dict[str, Any]] = {
    "fewer-layers": {"layers": "1"},
    "freeze": {"share": 0.5},
    "dps": {"update_ratio": 0.25},
    "sensi-bert": {"warmup": 0.35},
    "s2ft": {"share": 0.25, "selection": "gradient"},
    "smt": {"block": 16, "warmup": 0.25, "share": 0.2},
    "lora": {"rank": 4},
    "dsee": {"rank": 4, "sparse": 16},
    "lnsr": {"layer": 0.5, "sigma": 0.2},
    "child-tuning": {"reserve": 0.2},
    "sift": {"share": 0.05},
    "far": {"priming": 0.25},
    "green-trainer": {"share": 0.6},
    "autofreeze": {"intervals": 6},
    "lisa": {"layers": 1, "interval": 3},
    "grow": {"stages": 2},
}
