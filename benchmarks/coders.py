"""Million weights per second of the coders, in pure Python with NumPy and compiled."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import save

from espalier.encode import compiled
from espalier.encode.adaptive import transcode_plane
from espalier.encode.coder import Hint
from espalier.encode.huffman import Huffman
from espalier.encode.rans import Rans
from espalier.encode.symbols import Alphabet

LEVELS, ZERO = 15, 7


def plane(rows: int, density: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    kept = np.clip(np.round(rng.normal(size=(rows, 1000)) * 3), -7, 7).astype(np.int64)
    kept[kept == 0] = 1
    return np.where(rng.random((rows, 1000)) < density, kept, 0) + ZERO


def timed(repeats: int, job: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, float]:
    """``(result, median seconds of processor time)``."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        result = job(*arguments, **options)
        seconds.append(time.process_time() - started)
    return result, statistics.median(seconds)


def row(
    coder: str, path: str, symbols: np.ndarray, size: int, encoding: float, decoding: float, **setting: Any
) -> dict[str, Any]:
    millions = symbols.size / 1e6
    found = {
        "id": f"encode.{coder}", "row": f"{coder}, {path}", "claimed": {},
        "measured": {"encode_mweights_s": round(millions / encoding, 2),
                     "decode_mweights_s": round(millions / decoding, 2),
                     "bits_per_weight": round(8 * size / symbols.size, 4)},
        "setting": {"path": path, "weights": symbols.size, "levels": LEVELS, "clock": "processor time, median",
                    **setting},
        "seed": 0,
    }  # fmt: skip
    print(found["row"], setting, found["measured"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", default="coders", help="name of the result")
    arguments = parser.parse_args()
    repeats = 3 if arguments.quick else 7
    rows = []
    alphabet = Alphabet(0, LEVELS - 1, ZERO)
    for density in (0.1, 0.04):
        for path in ("portable", "compiled") if compiled.available() else ("portable",):
            machine = path == "compiled"
            symbols = plane(4000 if machine else 500, density)
            for mixing in (False, True):
                options = {"mixing": mixing, "compiled": machine}
                prior = int(256 * density)
                transcode_plane(symbols[:10], None, alphabet, 2, prior, **options)
                blob, encoding = timed(repeats, transcode_plane, symbols, None, alphabet, 2, prior, **options)
                back = np.zeros_like(symbols)
                transcode_plane(back[:0], b"", alphabet, 2, prior, **options)
                _, decoding = timed(repeats, transcode_plane, back, blob, alphabet, 2, prior, **options)
                if not np.array_equal(back, symbols):
                    raise SystemExit("not the same weights")
                name = "mixed" if mixing else "direct"
                rows.append(row("adaptive", path, symbols, len(blob), encoding, decoding, density=density, model=name))
        values = plane(4000, density).astype(np.uint8)
        for coder in (Rans(), Huffman(index_bits=5)):
            blob, encoding = timed(repeats, coder.encode, values, Hint(ZERO))
            back, decoding = timed(repeats, coder.decode, blob, values.dtype, values.shape)
            if not np.array_equal(back, values):
                raise SystemExit("not the same weights")
            rows.append(row(coder.id, "portable", values, len(blob), encoding, decoding, density=density))
    save(arguments.out, rows)


if __name__ == "__main__":
    main()
