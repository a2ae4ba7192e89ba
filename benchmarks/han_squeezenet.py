"""Han's published SqueezeNet, the same weights bit for bit in our container, beside his file and other coders."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import save
from benchmarks.planes_compared import compare, method_id, order_0

from espalier.core.representation import Codebook, Dense, Representation
from espalier.encode import open_file, write

HIS_FILE = 675_763
FLOOR = 543_331


def weights(folder: Path) -> dict[str, np.ndarray]:
    import torch

    state = torch.load(folder / "imagenet_squeezenet" / "squeezenet_v1_0_dc.pth", weights_only=True)
    return {name: tensor.numpy() for name, tensor in state.items()}


def represent(values: np.ndarray) -> Representation:
    """Distinct values as a codebook where there are at most 256 and they repeat."""
    centroids, indices = np.unique(values, return_inverse=True)
    if centroids.size > 256 or centroids.size == values.size:
        return Dense(shape=values.shape, values=values)
    return Codebook(shape=values.shape, indices=indices.reshape(values.shape).astype(np.uint8), centroids=centroids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", default=os.environ.get("ESPALIER_DATA"))
    parser.add_argument("--quick", action="store_true", help="the file only, no other coders")
    parser.add_argument("--out", default="han_squeezenet", help="name of the result")
    arguments = parser.parse_args()
    if not arguments.data_dir:
        parser.error("--data-dir or ESPALIER_DATA must name the data folder")
    original = weights(Path(arguments.data_dir))
    tensors = {name: represent(values) for name, values in original.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "squeezenet.espalier"
        started = time.perf_counter()
        info = write(path, tensors, model="SqueezeNet")
        encoding = time.perf_counter() - started
        started = time.perf_counter()
        with open_file(path) as archive:
            equal = all(archive.get(name).tobytes() == values.tobytes() for name, values in original.items())
        decoding = time.perf_counter() - started
        size = path.stat().st_size
    if not equal or size != info.bytes:
        raise SystemExit("the file does not hold the same weights")
    columns = {c: sum(getattr(t, c) for t in info.tensors) for c in ("values", "positions", "codebooks", "floats")}
    rows = [{
        "id": "encode.adaptive", "row": "file",
        "claimed": {"bytes": HIS_FILE, "source": "compressed_SqueezeNet.net as published with Deep Compression"},
        "measured": {"bytes": size, "bit_for_bit": equal, "order_0_floor": FLOOR, "header": info.prefix + info.header,
                     **columns, "encode_seconds": round(encoding, 2), "decode_seconds": round(decoding, 2)},
        "setting": {"floats": "fp32", "weights": sum(v.size for v in original.values()),
                    "kept": int(sum(np.count_nonzero(v) for v in original.values()))}, "seed": None,
    }]  # fmt: skip
    print(rows[0]["measured"])
    if not arguments.quick:
        planes = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Codebook)}
        order_0_bytes = round(sum(order_0(plane.indices) for plane in planes.values()))
        for coder, result in compare(planes).items():
            rows.append({
                "id": method_id(coder), "row": coder, "claimed": {}, "measured": {"bytes": result},
                "setting": {"planes": len(planes), "order_0_bytes": order_0_bytes}, "seed": None,
            })  # fmt: skip
            print(f"{coder:36} {result}")
    save(arguments.out, rows)


if __name__ == "__main__":
    main()
