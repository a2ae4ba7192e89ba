"""An ONNX file as OpenVINO's own two files, in fp32: ``.xml`` for the structure, ``.bin`` for the weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from espalier.core.errors import ModelError
from espalier.deploy.installed import need, quiet
from espalier.deploy.runtimes import first_line
from espalier.deploy.signature import Signature


def write_openvino(onnx_file: Path, signature: Signature, path: Path) -> None:
    """Read ``onnx_file`` and write ``path`` (``.xml``) and the ``.bin`` beside it; weights stay fp32.

    Raises ``ModelError`` where OpenVINO does not read the model.
    """
    (ov,) = need("the OpenVINO export", "openvino")
    try:
        with quiet():
            model = ov.Core().read_model(str(onnx_file))
            if model.has_rt_info(["framework"]):
                model.set_rt_info("onnx", ["framework"])
            model.set_rt_info(signature.to_json(), ["espalier", "signature"])
            model.set_friendly_name("espalier")
            _rename(model.get_ordered_ops())
            ov.save_model(model, str(path), compress_to_fp16=False)
    except RuntimeError as error:
        raise ModelError(f"OpenVINO does not read the exported model: {first_line(error)} Try ONNX.") from error


def _rename(operations: Sequence[Any]) -> None:
    """Names of the form ``Type_N`` by place in the file: OpenVINO counts N through the whole process."""
    automatic = [op for op in operations if re.fullmatch(rf"{op.get_type_name()}_\d+", op.get_friendly_name())]
    taken = {op.get_friendly_name() for op in operations} - {op.get_friendly_name() for op in automatic}
    counts: Counter[str] = Counter()
    for op in automatic:
        kind = op.get_type_name()
        while (name := f"{kind}_{counts[kind]}") in taken:
            counts[kind] += 1
        counts[kind] += 1
        op.set_friendly_name(name)
