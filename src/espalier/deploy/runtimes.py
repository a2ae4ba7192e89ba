"""Exported files run: one kind of session for onnxruntime, OpenVINO, ExecuTorch and torch, and a module around it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.core.errors import ModelError, RunError, UsageError, did_you_mean
from espalier.core.model import evaluating
from espalier.deploy.installed import need, quiet, version
from espalier.deploy.signature import Signature, tensors_in, unnamed

Array = np.ndarray[Any, Any]
SIGNATURE = "espalier.signature"
"""Key under which an exported file keeps its signature."""


def available() -> dict[str, str]:
    """The runtimes that are installed, with their versions."""
    found = {"torch": torch.__version__, **{name: version(name) for name in SUFFIXES}}
    return {name: said for name, said in found.items() if said is not None}


class Session(ABC):
    """A file (or module) loaded into a runtime: called with named arrays, answers with named arrays."""

    runtime: str
    signature: Signature

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @abstractmethod
    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """Outputs in the order of ``signature.outputs`` for inputs in the order of ``signature.inputs``."""

    def __call__(self, **inputs: Array | Tensor) -> dict[str, Array]:
        """Run on inputs by name. Raises ``ModelError`` for missing, unknown or unfitting ones."""
        names = self.signature.inputs
        if set(inputs) != set(names):
            raise ModelError(f"the file takes {', '.join(names)}; got {', '.join(inputs) or 'nothing'}.")
        arrays = [_array(inputs[name]) for name in names]
        return dict(zip(self.signature.outputs, self.run(arrays), strict=True))

    def module(self) -> Deployed:
        """The session as a module that is called as the exported model was: usable in ``Task.measure``."""
        return Deployed(self)


class Deployed(nn.Module):
    """A session behind the interface of the model that was exported; it has no parameters and no gradient."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs as CPU tensors, in the containers the exported model returned."""
        signature = self.session.signature
        arrays = self.session.run([_array(tensor) for tensor in signature.bind(args, kwargs)])
        return signature.result([torch.from_numpy(array) for array in arrays])

    def extra_repr(self) -> str:
        """Runtime and threads, for ``print(module)``."""
        return f"{self.session.runtime}, {self.session.threads} threads"


def _array(value: Array | Tensor) -> Array:
    return np.ascontiguousarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)


class OnnxRuntime(Session):
    """onnxruntime on the CPU. Idle threads stop spinning after each call, so that they disturb nobody's timing."""

    runtime = "onnxruntime"

    def __init__(self, path: Path, threads: int, *, fused: bool = True) -> None:
        super().__init__(threads)
        (ort,) = need("running a file in onnxruntime", "onnxruntime")
        options = ort.SessionOptions()
        if not fused:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        with quiet():
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = [item.name for item in self._session.get_inputs()]
        outputs = [item.name for item in self._session.get_outputs()]
        stored = self._session.get_modelmeta().custom_metadata_map.get(SIGNATURE)
        self.signature = _signature(stored, inputs, outputs)
        self._taken = set(inputs)

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        feed = {k: v for k, v in zip(self.signature.inputs, arrays, strict=True) if k in self._taken}
        return list(self._session.run(list(self.signature.outputs), feed))


class OpenVINO(Session):
    """OpenVINO on the CPU, computing in fp32 unless told (by itself it chooses bf16 where the processor has it)."""

    runtime = "openvino"

    def __init__(self, path: Path, threads: int, precision: str = "fp32") -> None:
        super().__init__(threads)
        (ov,) = need("running a file in OpenVINO", "openvino")
        core = ov.Core()
        with quiet():
            model = core.read_model(str(path))
        config = {
            "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
        }  # fmt: skip
        if precision == "auto":
            del config["INFERENCE_PRECISION_HINT"]
        stored = None
        if model.has_rt_info(["espalier", "signature"]):
            stored = str(model.get_rt_info(["espalier", "signature"]).value)
        elif model.has_rt_info(["framework", SIGNATURE]):  # an ONNX file read by OpenVINO
            stored = str(model.get_rt_info(["framework", SIGNATURE]).value)
        inputs = [port.get_any_name() for port in model.inputs]
        outputs = [port.get_any_name() for port in model.outputs]
        self.signature = _signature(stored, inputs, outputs)
        self._request = core.compile_model(model, "CPU", config).create_infer_request()
        self._inputs = _places(self.signature.inputs, [port.get_names() for port in model.inputs])
        self._outputs = _places(self.signature.outputs, [port.get_names() for port in model.outputs])

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        feed = {place: array for array, place in zip(arrays, self._inputs, strict=True) if place is not None}
        found = self._request.infer(feed, share_inputs=True)
        return [np.asarray(found[place]) for place in self._outputs if place is not None]


class TorchSession(Session):
    """A torch module in eval mode, for comparison. torch's thread count belongs to the process: set it there."""

    runtime = "torch"

    def __init__(self, model: nn.Module, threads: int) -> None:
        super().__init__(threads)
        self._model = model
        self.signature = unnamed((), ())

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        with evaluating(self._model) as model:
            return [_array(tensor) for tensor in tensors_in(model(*map(torch.from_numpy, arrays)))]

    def __call__(self, **inputs: Array | Tensor) -> dict[str, Array]:
        """Run on inputs by argument name; outputs are ``output.N`` in order."""
        with evaluating(self._model) as model:
            given = {name: torch.as_tensor(value) for name, value in inputs.items()}
            return {f"output.{n}": _array(t) for n, t in enumerate(tensors_in(model(**given)))}

    def module(self) -> Any:
        """The module itself."""
        return self._model


def _places(names: Sequence[str], ports: Sequence[set[str]]) -> list[int | None]:
    """The port of each name; None for an input that the runtime removed because nothing uses it."""
    return [next((n for n, port in enumerate(ports) if name in port), None) for name in names]


def _signature(stored: str | None, inputs: Sequence[str], outputs: Sequence[str]) -> Signature:
    return unnamed(inputs, outputs) if stored is None else Signature.from_json(stored)


_HINTS = {"fp32": "f32", "bf16": "bf16", "auto": "dynamic"}
PRECISIONS = tuple(_HINTS)
SUFFIXES = {"onnxruntime": (".onnx",), "openvino": (".xml", ".onnx"), "executorch": (".pte",)}
RUNTIMES = (*SUFFIXES, "torch")


def simulation(path: Path) -> Session:
    """``path`` (``.onnx``) in onnxruntime with no fusion: every QuantizeLinear and operator as it is written."""
    return OnnxRuntime(path, 1, fused=False)


def open(  # noqa: A001
    source: str | Path | nn.Module, runtime: str | None = None, *, threads: int = 1, precision: str = "fp32"
) -> Session:
    """Load an exported file (for ``torch``: a module) into a runtime.

    By default ``.onnx`` opens in onnxruntime, ``.xml`` in OpenVINO and a module in torch. ``threads`` is what one
    call may use. ``precision``: of what the file holds in floating point: ``fp32``; in OpenVINO also ``bf16`` (needs
    no calibration) and ``auto``, its own choice for this processor. Int8 layers stay int8. Raises ``UsageError`` for
    an unknown runtime or precision or a file it does not read, ``NeedError`` where the package is missing,
    ``ModelError`` where the runtime refuses the file.
    """
    if isinstance(source, nn.Module):
        if runtime not in (None, "torch"):
            raise UsageError(f"{runtime} runs files; export the module first: deploy.to_onnx(model, example, path).")
        _check_precision("torch", precision)
        return TorchSession(source, threads)
    path = Path(source)
    runtime = runtime or {".xml": "openvino", ".pte": "executorch"}.get(path.suffix, "onnxruntime")
    if runtime not in RUNTIMES:
        raise UsageError(f"there is no runtime {runtime!r}.{did_you_mean(runtime, RUNTIMES)}")
    if runtime == "torch":
        raise UsageError(f"torch runs modules: open(espalier.load({str(path)!r})) for an .espalier file.")
    if threads < 1:
        raise UsageError(f"threads must be 1 or more; got {threads!r}.")
    if not path.is_file():
        raise RunError(f"there is no file {path}.")
    if path.suffix not in SUFFIXES[runtime]:
        raise UsageError(f"{runtime} reads {' and '.join(SUFFIXES[runtime])} files; got {path.name}.")
    _check_precision(runtime, precision)
    need(f"running a file in {runtime}", runtime)
    try:
        if runtime == "executorch":
            from espalier.deploy.executorch_session import ExecuTorch

            return ExecuTorch(path, threads)
        return OpenVINO(path, threads, precision) if runtime == "openvino" else OnnxRuntime(path, threads)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{runtime} does not read {path}: {first_line(error)} Export the model again.") from error
    except Exception as error:
        if type(error).__module__.startswith("onnxruntime"):
            raise ModelError(f"{runtime} does not read {path}: {first_line(error)} Export the model again.") from error
        raise


def _check_precision(runtime: str, precision: str) -> None:
    if precision not in PRECISIONS:
        raise UsageError(f"there is no precision {precision!r}.{did_you_mean(precision, PRECISIONS)}")
    if precision != "fp32" and runtime != "openvino":
        raise UsageError(
            f"{runtime} computes an fp32 file in fp32; {precision} is OpenVINO's: open(path, 'openvino', "
            f"precision={precision!r})."
        )


def first_line(error: BaseException) -> str:
    """The first line of what another package said, as a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return f"{text[:300].rstrip('.')}."
