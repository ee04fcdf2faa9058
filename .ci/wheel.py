"""Check the release files of a folder: ``python .ci/wheel.py dist``.

One wheel and one sdist; the wheel for every Python from 3.10 on and for manylinux, its library
without a Python symbol and with torch and libc alone to load.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MAY_NEED = re.compile(r"lib(torch_cpu|c10|stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so|ld-linux")


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(folder: Path) -> None:
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    assert re.search(r"-cp310-abi3-manylinux_\d+_\d+_\w+\.whl$", wheel.name), wheel.name
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as place:
        binaries = [name for name in archive.namelist() if ".so" in name]
        assert binaries == ["sensikernels/libsensikernels.so"], binaries
        library = archive.extract(binaries[0], place)
        undefined = re.findall(r"^\s+\w (\w+)", said("nm", "-D", "--undefined-only", library), re.M)
        assert any(name.startswith("aoti_torch_") for name in undefined), "nm names no symbol"
        python = [name for name in undefined if re.match(r"_?Py[A-Z_]", name)]
        assert not python, python
        needed = re.findall(r"\(NEEDED\).*\[(.+)\]", said("readelf", "-d", library))
        assert needed, "readelf names no library"
        others = [name for name in needed if not MAY_NEED.match(name)]
        assert not others, others
        size = Path(library).stat().st_size
    for path in (wheel, sdist):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
    print(f"{binaries[0]}: {size / 1e6:.2f} MB, needs {', '.join(needed)}, no Python symbol")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
