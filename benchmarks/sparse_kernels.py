"""Pruned weights in the runtimes that have kernels for zeros, beside the same layer dense; and why where none has.

python benchmarks/sparse_kernels.py [--quick] [--threads 1] [--only torch onnxruntime openvino]

One linear layer without bias, pruned by ``prune.Prune`` (blocks, single weights, 2:4). A row per runtime, way of
running, pattern, sparsity, shape and batch; dense and sparse are called in turn in one process, warm, fp32, so each
finds the caches as the other left them.

torch        BSR for blocks and CSR for single weights, by ``F.linear`` and by ``mm`` with the activations as columns;
             2:4 by ``to_sparse_semi_structured`` (fp16, CUDA), and as CSR.
onnxruntime  the exported file with its zeros; the same with a ``sparse_initializer``; the operator
             ``com.microsoft.SparseToDenseMatMul`` on a CSR tensor, which must be fed at every call.
openvino     the exported file with its zeros; the same with CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402 - the thread counts above must be set first
import torch  # noqa: E402
from benchmarks.common import save  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from espalier.core.context import Context  # noqa: E402
from espalier.core.parametrize import plain  # noqa: E402
from espalier.deploy import runtimes, to_onnx  # noqa: E402
from espalier.deploy.check import difference  # noqa: E402
from espalier.deploy.installed import need  # noqa: E402
from espalier.measure import latency  # noqa: E402
from espalier.prune import NM, Blocks, Prune, Weights  # noqa: E402

Call = Callable[[], Tensor]
SHAPES, BATCHES = ((1024, 1024), (4096, 1024)), (1, 64)
"""Shapes as outputs x inputs."""
WORDS = {
    "openvino zeros": "the CPU plugin multiplies fp32 weights dense",
    "openvino property": "the rate is accepted and changes nothing: it is for int8 weights on processors with AMX",
    "onnxruntime zeros": "MatMul and Gemm have no sparse kernel on the CPU; the zeros are multiplied",
    "onnxruntime sparse_initializer": "a way of storing only: expanded to a dense tensor when the file is loaded",
    "onnxruntime operator": "the weight cannot stand in the file, so it is fed as a sparse input at every call",
}


def weight_of(layer: nn.Module) -> Tensor:
    """A copy of its only parameter."""
    return next(layer.parameters()).detach().clone()


@dataclass(frozen=True)
class Kind:
    """What is pruned away. ``block``: edge of the square BSR blocks, 0 for CSR."""

    name: str
    pattern: Blocks | Weights | NM
    sparsity: float
    block: int = 0

    def prune(self, layer: nn.Module) -> Tensor:
        """The weight of a pruned copy of ``layer``."""
        share = None if isinstance(self.pattern, NM) else self.sparsity
        done = plain(Prune(pattern=self.pattern, sparsity=share)(layer, Context()))
        return weight_of(done)


TWO_FOUR = Kind("2:4", NM(n=2, m=4), 0.5)


def blocks(edge: int, sparsity: float) -> Kind:
    return Kind(f"blocks {edge}x{edge}", Blocks(height=edge, width=edge), sparsity, edge)


def single(sparsity: float) -> Kind:
    return Kind("weights", Weights(), sparsity)


class Run(nn.Module):
    """A call without arguments, so that everything is timed by the same loop."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self) -> Tensor:
        return self.call()


@dataclass
class Bench:
    """What all rows share, and the rows so far."""

    threads: int
    quick: bool
    rows: list[dict[str, Any]]

    def time(self, calls: dict[str, Call]) -> dict[str, dict[str, Any]]:
        """Median and spread of every call, one of each in turn."""
        repeats, seconds = (40, 0.6) if self.quick else (200, 2.0)
        modules = {name: Run(call) for name, call in calls.items()}
        found = latency(
            modules, lambda run: run(), repeats=repeats, warmup=5, threads=self.threads, seconds=seconds
        )  # fmt: skip
        return {
            name: {"ms": round(f.median_ms, 4), "p10_p90_ms": [round(f.p10_ms, 4), round(f.p90_ms, 4)], "runs": f.runs}
            for name, f in found.items()
        }

    def add(
        self, runtime: str, way: str, kind: Kind, weight: Tensor, batch: int, dense: Call | None,
        sparse: dict[str, Call], wanted: Tensor | None, words: str = "", **more: Any,
    ) -> None:  # fmt: skip
        """One row: ``sparse`` are ways to call the same kernel, the fastest counts. Without any, only ``words``."""
        rows, columns = weight.shape
        measured: dict[str, Any] = {"zeros": round(1 - int(weight.count_nonzero()) / weight.numel(), 4), **more}
        if dense is not None and sparse and wanted is not None:
            gaps = {name: difference(call(), wanted) for name, call in sparse.items()}
            timed = self.time({"dense": dense, **sparse})
            best = min(sparse, key=lambda name: timed[name]["ms"])
            measured |= {
                "dense_ms": timed["dense"]["ms"], "sparse_ms": timed[best]["ms"], "call": best,
                "speedup": round(timed["dense"]["ms"] / timed[best]["ms"], 3),
                "difference": max(gaps.values()), "calls": timed,
            }  # fmt: skip
        if words:
            measured["reason"] = words
        name = f"{runtime}, {way}, {kind.name}, {kind.sparsity:.0%}, {rows}x{columns}, batch {batch}"
        setting = {
            "runtime": f"{runtime} {runtimes.available()[runtime]}", "threads": self.threads, "quick": self.quick,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        }  # fmt: skip
        self.rows.append(
            {"id": "sparse_kernels", "row": name, "claimed": {}, "measured": measured, "setting": setting, "seed": 0}
        )  # fmt: skip
        figures = (
            f"{measured['dense_ms']:.3f} -> {measured['sparse_ms']:.3f} ms, x {measured['speedup']:.2f}, "
            f"differs {measured['difference']:.0e} ({measured['call']})" if "speedup" in measured else ""
        )  # fmt: skip
        print(f"{name:72} {figures} {words}", flush=True)


def layer_of(shape: tuple[int, int]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)).eval()


def inputs(shape: tuple[int, int], batch: int) -> Tensor:
    return torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(batch))


def linear_call(x: Tensor, weight: Tensor) -> Call:
    return lambda: F.linear(x, weight)


def columns_call(x: Tensor, weight: Tensor) -> Call:
    """The weight first, the activations as its columns; the result is a transposed view."""
    return lambda: torch.mm(weight, x.t()).t()


def torch_rows(bench: Bench, shape: tuple[int, int], kinds: list[Kind]) -> None:
    """BSR and CSR on the CPU, 2:4 where there is CUDA."""
    layer = layer_of(shape)
    full = weight_of(layer)
    for kind in kinds:
        weight = kind.prune(layer)
        stored = weight.to_sparse_bsr((kind.block, kind.block)) if kind.block else weight.to_sparse_csr()
        for batch in BATCHES:
            x = inputs(shape, batch)
            calls = {"F.linear": linear_call(x, stored), "mm": columns_call(x, stored)}
            way = "BSR" if kind.block else "CSR"
            bench.add("torch", way, kind, weight, batch, linear_call(x, full), calls, F.linear(x, weight))
    weight = TWO_FOUR.prune(layer)
    for batch in BATCHES:
        semi_structured(bench, full, weight, inputs(shape, batch))


def semi_structured(bench: Bench, full: Tensor, weight: Tensor, x: Tensor) -> None:
    """2:4 in torch's own format; the row says why where it does not run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    full, small, given = (tensor.to(device, torch.float16) for tensor in (full, weight, x))
    way = f"to_sparse_semi_structured fp16 {device}"
    try:
        stored = torch.sparse.to_sparse_semi_structured(small)
        calls: dict[str, Call] = {"F.linear": lambda: _waited(F.linear(given, stored))}
        wanted = F.linear(given, small)
        bench.add("torch", way, TWO_FOUR, weight, len(x), lambda: _waited(F.linear(given, full)), calls, wanted)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        said = " ".join(str(error).split())[:300]
        bench.add("torch", way, TWO_FOUR, weight, len(x), None, {}, None, said)


def _waited(result: Tensor) -> Tensor:
    if result.is_cuda:
        torch.cuda.synchronize()
    return result


def exported(layer: nn.Module, weight: Tensor, x: Tensor, path: Path) -> Path:
    """The file of ``layer`` with ``weight``; espalier's export runs and compares it."""
    with torch.no_grad():
        next(layer.parameters()).copy_(weight)
    return to_onnx(layer, x, path).path


def with_sparse_initializer(file: Path, path: Path) -> Path:
    """The same ONNX file with its largest initialiser in coordinate form."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(file))
    chosen = max(model.graph.initializer, key=lambda each: int(np.prod(each.dims)))
    dense = numpy_helper.to_array(chosen)
    places = np.flatnonzero(dense).astype(np.int64)
    values = numpy_helper.from_array(np.ascontiguousarray(dense.ravel()[places]), chosen.name)
    index = numpy_helper.from_array(places, f"{chosen.name}_index")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, index, list(dense.shape)))
    model.graph.initializer.remove(chosen)
    path.write_bytes(model.SerializeToString())
    return path


def session_call(session: runtimes.Session, x: Tensor) -> Call:
    array = x.numpy()
    return lambda: torch.from_numpy(session.run([array])[0])


def operator_call(weight: Tensor, x: Tensor, threads: int) -> Call:
    """onnxruntime's SparseToDenseMatMul: a CSR weight by activations as columns."""
    from onnx import TensorProto, helper

    (ort,) = need("the operator", "onnxruntime")
    rows, columns = weight.shape
    graph = helper.make_graph(
        [helper.make_node("SparseToDenseMatMul", ["w", "x"], ["y"], domain="com.microsoft")], "product",
        [
            helper.make_sparse_tensor_value_info("w", TensorProto.FLOAT, [rows, columns]),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [columns, len(x)]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, len(x)])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    file = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    csr = weight.to_sparse_csr()
    stored = ort.SparseTensor.sparse_csr_from_numpy(
        np.array([rows, columns], dtype=np.int64), csr.values().numpy(), csr.col_indices().numpy(),
        csr.crow_indices().numpy(), ort.OrtDevice.make("cpu", 0),
    )  # fmt: skip
    feed = {
        "w": ort.OrtValue.ort_value_from_sparse_tensor(stored),
        "x": ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x.t().numpy())),
    }
    return lambda: torch.from_numpy(session.run_with_ort_values(None, feed)[0].numpy()).t()


class Compiled:
    """A file in OpenVINO as espalier opens it, with further properties."""

    def __init__(self, file: Path, threads: int, **properties: Any) -> None:
        (ov,) = need("running a file in OpenVINO", "openvino")
        core = ov.Core()
        config = {
            "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32", **properties,
        }  # fmt: skip
        self.model = core.compile_model(core.read_model(str(file)), "CPU", config)
        self.request = self.model.create_infer_request()

    def call(self, x: Tensor) -> Call:
        feed = {0: x.numpy()}
        return lambda: torch.from_numpy(np.asarray(self.request.infer(feed, share_inputs=True)[0]))

    def kernels(self) -> list[str]:
        """The primitives that the plugin chose for the products."""
        found = []
        for node in self.model.get_runtime_model().get_ops():
            said = {name: str(node.get_rt_info()[name].value) for name in ("layerType", "primitiveType")
                    if name in node.get_rt_info()}  # fmt: skip
            if said.get("layerType") in ("FullyConnected", "MatMul"):
                found.append(said.get("primitiveType", ""))
        return found


def file_rows(bench: Bench, shape: tuple[int, int], kinds: list[Kind], chosen: list[str]) -> None:
    """onnxruntime and OpenVINO on exported files."""
    layer = layer_of(shape)
    full = weight_of(layer)
    example = inputs(shape, 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense_file = exported(layer_of(shape), full, example, folder / "dense.onnx")
        for number, kind in enumerate(kinds):
            weight = kind.prune(layer)
            file = exported(layer_of(shape), weight, example, folder / f"{number}.onnx")
            if "onnxruntime" in chosen:
                onnxruntime_rows(bench, kind, weight, dense_file, file)
            if "openvino" in chosen:
                openvino_rows(bench, kind, weight, dense_file, file)


def onnxruntime_rows(bench: Bench, kind: Kind, weight: Tensor, dense_file: Path, file: Path) -> None:
    thinner = with_sparse_initializer(file, file.with_name(f"sparse_{file.name}"))
    dense, zeros, thin = (runtimes.open(each, threads=bench.threads) for each in (dense_file, file, thinner))
    sizes = {"file_bytes": [file.stat().st_size, thinner.stat().st_size]}
    for batch in BATCHES:
        x = inputs((weight.shape[0], weight.shape[1]), batch)
        wanted, reference = F.linear(x, weight), session_call(dense, x)
        ways: list[tuple[str, Callable[[], Call], str, dict[str, Any]]] = [
            ("MatMul with zeros", partial(session_call, zeros, x), "zeros", {}),
            ("sparse_initializer", partial(session_call, thin, x), "sparse_initializer", sizes),
            ("SparseToDenseMatMul", partial(operator_call, weight, x, bench.threads), "operator", {}),
        ]
        for way, make, reason, more in ways:
            words = WORDS[f"onnxruntime {reason}"]
            try:
                call = make()
            except Exception as error:  # what a build of onnxruntime leaves out differs
                said = f"refused: {runtimes.first_line(error)}"
                bench.add("onnxruntime", way, kind, weight, batch, None, {}, None, said)
                continue
            bench.add("onnxruntime", way, kind, weight, batch, reference, {way: call}, wanted, words, **more)


def openvino_rows(bench: Bench, kind: Kind, weight: Tensor, dense_file: Path, file: Path) -> None:
    rate = {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": kind.sparsity - 0.02}  # just below, so that the weight qualifies
    dense, zeros = Compiled(dense_file, bench.threads), Compiled(file, bench.threads)
    try:
        asked, refused = Compiled(file, bench.threads, **rate), ""
    except RuntimeError as error:
        asked, refused = None, f"refused: {runtimes.first_line(error)}"
    for batch in BATCHES:
        x = inputs((weight.shape[0], weight.shape[1]), batch)
        wanted, reference = F.linear(x, weight), dense.call(x)
        for way, compiled, words in (
            ("zeros", zeros, WORDS["openvino zeros"]),
            ("decompression rate", asked, WORDS["openvino property"]),
        ):
            if compiled is None:
                bench.add("openvino", way, kind, weight, batch, None, {}, None, refused)
                continue
            calls = {way: compiled.call(x)}
            more = {"kernels": compiled.kernels()}
            bench.add("openvino", way, kind, weight, batch, reference, calls, wanted, words, **more)


def plans(*, quick: bool) -> Iterator[tuple[tuple[int, int], list[Kind], list[Kind]]]:
    """(shape, kinds for torch, kinds for the files)."""
    if quick:
        yield SHAPES[0], [blocks(32, 0.9), single(0.9), TWO_FOUR], [single(0.9)]
        return
    stored = [*(blocks(edge, share) for share in (0.9, 0.95) for edge in (16, 32, 64)), single(0.9), single(0.95)]
    written = [single(0.8), single(0.9), single(0.95), blocks(32, 0.9), TWO_FOUR]
    for shape in SHAPES:
        yield shape, [*stored, TWO_FOUR], written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, few patterns, few repeats")
    parser.add_argument("--threads", type=int, default=1, help="of every runtime")
    parser.add_argument("--only", nargs="*", choices=runtimes.RUNTIMES, default=())
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    chosen = [name for name in options.only or runtimes.RUNTIMES if name in runtimes.available()]
    bench = Bench(options.threads, options.quick, [])
    for shape, stored, written in plans(quick=options.quick):
        if "torch" in chosen:
            torch_rows(bench, shape, stored)
        if set(chosen) - {"torch"}:
            file_rows(bench, shape, written, chosen)
        save("sparse_kernels" + ("_quick" if options.quick else ""), bench.rows)


if __name__ == "__main__":
    main()
