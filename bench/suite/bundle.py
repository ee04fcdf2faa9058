"""Weights and data for a machine without network: ``… bench.suite.bundle DIR [--data-dir GLUE]``.

Writes the MiniLM weights in float16 (45 MB) where Python finds them once DIR is on its path, and
GLUE's training and development files of SST-2, MRPC and QNLI, for ``gpu_suite.sh --bundle DIR``.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from bench.suite.steps import WEIGHTS

TASKS = ("SST-2", "MRPC", "QNLI")


def pack_weights(source: Path, target: Path) -> None:
    """The model's folder with its matrices in float16."""
    import torch
    from safetensors.torch import load_file, save_file

    model = target / WEIGHTS / "model"
    model.mkdir(parents=True, exist_ok=True)
    (target / WEIGHTS / "__init__.py").write_text("")
    for path in source.iterdir():
        if path.suffix in (".json", ".txt") and path.is_file():
            shutil.copyfile(path, model / path.name)
    tensors = load_file(source / "model.safetensors")
    small = {n: t.half() if t.dtype == torch.float32 else t for n, t in tensors.items()}
    save_file(small, model / "model.safetensors", metadata={"format": "pt"})


def pack_data(source: Path, target: Path) -> list[str]:
    """The tasks of ``TASKS`` that ``source`` has."""
    packed = []
    for task in TASKS:
        for path in sorted((source / task).glob("*")):
            if path.is_file() and not path.name.startswith("test") and path.suffix != ".md":
                (target / "glue" / task).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / "glue" / task / path.name)
                packed.append(f"{task}/{path.name}")
    return packed


def main() -> int:
    """Pack, and say how large it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data-dir", type=Path)
    given = parser.parse_args()
    from sensikernels.data import embedded_model_path

    pack_weights(embedded_model_path(), given.folder)
    if given.data_dir is not None:
        print("\n".join(pack_data(given.data_dir, given.folder)))
    size = sum(p.stat().st_size for p in given.folder.rglob("*") if p.is_file())
    print(f"{given.folder}: {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
