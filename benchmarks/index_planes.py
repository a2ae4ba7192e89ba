"""The index planes of compressed networks through our coders and through others: which is smallest?

python benchmarks/index_planes.py FILE.espalier ...    (for example what mnist_lenets.py --keep DIR left)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import save
from benchmarks.planes_compared import compare, method_id, order_0

from espalier.core.representation import Codebook
from espalier.encode import open_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    rows = []
    for path in parser.parse_args().files:
        with open_file(path) as archive:
            tensors = {name: archive.representation(name) for name in archive.keys()}  # noqa: SIM118
        planes = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Codebook)}
        label = path.resolve().parent.name
        for coder, size in compare(planes).items():
            print(f"{label:28} {coder:36} {size}")
            rows.append({
                "id": method_id(coder), "row": f"{label}: {coder}", "claimed": {}, "measured": {"bytes": size},
                "setting": {"planes": list(planes), "weights": sum(plane.numel for plane in planes.values()),
                            "order_0_bytes": round(sum(order_0(plane.indices) for plane in planes.values()))},
                "seed": None,
            })  # fmt: skip
    save("index_planes", rows)


if __name__ == "__main__":
    main()
