"""The decoder in an interpreter that has NumPy and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

import espalier
from espalier.encode import write

from .support import every_kind

SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
for name in ("torch", "safetensors", "yaml", "rich", "numba", "scipy"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(name + " can be imported: this proves nothing")
import espalier.encode
with espalier.encode.open_file({file!r}) as archive:
    archive.verify()
    for name in archive:
        print(name, archive.get(name).tobytes().hex())
espalier.encode.unpack({file!r}, {out!r})
espalier.encode.write({again!r}, {{name: archive.representation(name) for name in ()}})
assert not [m for m in sys.modules if m.split(".")[0] in ("torch", "safetensors", "yaml", "rich", "numba")]
"""


def test_decodes_without_torch(tmp_path):
    folder = tmp_path / "packages"
    folder.mkdir()
    site = Path(np.__file__).parents[1]
    for package in (site / "numpy", site / "numpy.libs", Path(espalier.__file__).parent):
        if package.exists():
            (folder / package.name).symlink_to(package)
    file = tmp_path / "m.espalier"
    tensors = every_kind()
    write(file, tensors)
    script = SCRIPT.format(
        folder=str(folder), file=str(file), out=str(tmp_path / "m.safetensors"), again=str(tmp_path / "n.espalier")
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = dict((line + " ").split(" ")[:2] for line in done.stdout.splitlines())
    assert lines == {name: r.dense().tobytes().hex() for name, r in tensors.items()}
    assert (tmp_path / "m.safetensors").stat().st_size > 100
