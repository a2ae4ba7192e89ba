"""A torch module as an ONNX file, by torch's own exporter; then tidied: readable names, no paths, same bytes again.

Why not a writer of our own: the exporter covers more operators than the graph's table, and is kept by others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from espalier.core.errors import ModelError
from espalier.core.files import write_atomic
from espalier.deploy.installed import need, quiet
from espalier.deploy.runtimes import SIGNATURE, first_line
from espalier.deploy.signature import Signature, tensors_in
from espalier.graph import Value
from espalier.graph.quiet import quiet as quiet_tracer
from espalier.graph.trace import idle_autocast, structural_copy
from espalier.graph.trees import fill

OPSET = 20
"""The newest opset that onnxruntime and OpenVINO both run whole, and the exporter's own."""

ONE_FILE = 1_900_000_000
"""Bytes of weights up to which one file is written: protobuf ends at 2 GiB."""

ROOT = "model"


class _Flat(nn.Module):
    """``model`` over a flat list of tensors."""

    def __init__(self, model: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.model = model
        self._signature = signature

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = fill(self._signature.call, lambda leaf: inputs[leaf.index] if isinstance(leaf, Value) else None)
        return tuple(tensors_in(self.model(*args, **kwargs)))


def write_onnx(
    model: nn.Module, signature: Signature, inputs: Sequence[Tensor], path: Path, *, external: bool | None = None
) -> tuple[bool, list[str]]:
    """Write ``path`` (and ``path.data`` where the weights stand apart); returns (free batch, notes).

    ``external``: weights in a file of their own; by default where they exceed what one file holds. Raises
    ``ModelError`` with torch's reason and the operator where the model cannot be exported.
    """
    need("the ONNX export", "onnx", "onnxscript")
    program, free, notes = exported_program(model, signature, inputs)
    try:
        found = _converted(program, signature)
    except Exception as error:
        found = None
        if any("scaled_dot_product" in str(node.target) for node in program.graph.nodes):
            with written_out_attention():
                program, free, notes = exported_program(model, signature, inputs)
            with suppress(Exception):
                found = _converted(program, signature)
        if found is None:
            raise _refusal(model, error) from error
        notes = [*notes, f"attention is written out as products of matrices: {_said(error)}"]
    if found is None:
        raise ModelError("torch.onnx.export returned nothing; please report the model.")
    with quiet():
        _tidy(found.model, signature)
        save_onnx(found.model, path, external=external)
    return free, notes


def _converted(program: ExportedProgram, signature: Signature) -> Any:
    with quiet():
        return torch.onnx.export(
            program, dynamo=True, verbose=False, opset_version=OPSET,
            input_names=list(signature.inputs), output_names=list(signature.outputs),
        )  # fmt: skip


@contextmanager
def written_out_attention() -> Iterator[None]:
    """``scaled_dot_product_attention`` as products and a softmax, for layouts that the exporter refuses."""
    fused = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001 - the export is of the evaluating model
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax((q / sqrt(d)) k^T + mask) v over the last two dimensions; the smallest tensor is scaled."""
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    found = query * (scale if scale is not None else query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if is_causal:
        seen = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).tril()
        found = found.masked_fill(~seen, -torch.inf)
    if attn_mask is not None:
        found = found.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else found + attn_mask
    return found.softmax(-1) @ value


def exported_program(
    model: nn.Module, signature: Signature, inputs: Sequence[Tensor], *, batch: Any = Dim.DYNAMIC
) -> tuple[ExportedProgram, bool, list[str]]:
    """The exported program with the batch left open where the model allows it; ``batch`` None fixes it."""
    flat = _Flat(structural_copy(model).eval(), signature).eval()
    first = next((n for n, x in enumerate(inputs) if x.ndim), None)
    size = inputs[first].shape[0] if first is not None else 0
    same = [x.ndim > 0 and x.shape[0] == size for x in inputs]
    attempts = [same, [n == first for n in range(len(inputs))], [False] * len(inputs)]
    if len(inputs) == 0 or not any(same) or batch is None:
        attempts = attempts[2:]
    elif sum(same) == 1:
        attempts = [same, attempts[2]]
    reason: Exception | None = None
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(value=False)  # else attention fuses into an operator ONNX does not know
    try:
        for chosen in attempts:
            example = [torch.cat([x, x]) if open_ and size == 1 else x for x, open_ in zip(inputs, chosen, strict=True)]
            shapes = {"inputs": tuple({0: batch} if open_ else None for open_ in chosen)}
            try:
                with torch.no_grad(), quiet_tracer(), idle_autocast():
                    program = torch.export.export(flat, tuple(example), dynamic_shapes=shapes, strict=False)
            except Exception as error:  # noqa: BLE001, RUF100 - any failure is told below, with its reason
                reason = reason or error
                continue
            free = any(chosen)
            notes = [f"the batch is fixed at {size}: {first_line(reason)}"] if reason and not free and any(same) else []
            return program, free, notes
    finally:
        torch.backends.mha.set_fastpath_enabled(value=fast)
    if reason is None:
        raise ModelError("a model without inputs cannot be exported.")
    raise ModelError(
        f"{type(model).__name__} cannot be exported; torch.export says: {type(reason).__name__}: {first_line(reason)}"
        f"{_operator(reason)} Change Python control flow that depends on tensor values (.item(), if x.sum() > 0) to "
        "torch.where or masks."
    ) from reason


def _refusal(model: nn.Module, error: Exception) -> ModelError:
    """What the ONNX exporter said, in one sentence that names the operator."""
    chain = _chain(error)
    operators = re.findall(r"No ONNX function found for <OpOverload\(op='([^']+)'", "\n".join(chain))
    if operators:
        named = ", ".join(dict.fromkeys(operators))
        return ModelError(
            f"{type(model).__name__} cannot be exported: the operator {named} has no ONNX form of opset {OPSET}. "
            "Write that part with other operators, or keep the .espalier file."
        )
    return ModelError(f"{type(model).__name__} cannot be exported to ONNX: {_said(error)}")


def _chain(error: Exception) -> list[str]:
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    return chain


def _said(error: Exception) -> str:
    """The innermost reason."""
    return first_line(ValueError(_chain(error)[-1]))


def _operator(error: Exception) -> str:
    found = re.search(r"torch\.ops\.([\w.]+)|aten[.:]+[\w.]+", str(error))
    return f" The operator is {found.group(0).removeprefix('torch.ops.')}." if found else ""


def _tidy(model: Any, signature: Signature) -> None:
    """Names after the modules, one name for the batch axis, and nothing that tells where the file was made."""
    graph = model.graph
    axes = {str(item.shape[0]) for item in graph.inputs if item.shape is not None and len(item.shape)}
    symbols = {axis for axis in axes if re.fullmatch(r"s\d+", axis)}
    taken = {value.name for value in (*graph.inputs, *graph.outputs)}
    for node in graph.all_nodes():
        for value in node.outputs:
            taken.add(value.name)
    for name in list(graph.initializers):
        value = graph.initializers[name]
        value.metadata_props.clear()
        short = name.removeprefix(f"{ROOT}.")
        if short != name and short not in taken and short not in graph.initializers:
            value.name = short
    counts: Counter[str] = Counter()
    for node in graph.all_nodes():
        scope = _scope(node.metadata_props)
        stem = f"{scope}/{node.op_type}" if scope else node.op_type
        counts[stem] += 1
        node.name = stem if counts[stem] == 1 else f"{stem}_{counts[stem]}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            _clean(value, symbols)
    for value in (*graph.inputs, *graph.outputs):
        _clean(value, symbols)
    model.metadata_props.clear()
    model.metadata_props[SIGNATURE] = signature.to_json()
    model.graph.name = "espalier"
    model.graph.doc_string = None


def _scope(properties: Mapping[str, str]) -> str:
    """Path of the module a node came from: ``['', 'model', 'model.0', 'linear']`` gives ``0``."""
    scopes = re.findall(r"'([^']*)'", properties.get("pkg.torch.onnx.name_scopes", ""))[:-1]
    return str(scopes[-1]).removeprefix(ROOT).removeprefix(".") if scopes else ""


def _clean(value: Any, symbols: set[str]) -> None:
    value.metadata_props.clear()
    if value.shape is None or not symbols:
        return
    pattern = re.compile(r"\b(" + "|".join(sorted(symbols)) + r")\b")
    for axis, size in enumerate(value.shape):
        if not isinstance(size, int) and size.value is not None:
            value.shape[axis] = pattern.sub("batch", str(size.value))


def save_onnx(model: Any, path: Path, *, external: bool | None = None) -> None:
    """Write a model of ``onnx_ir``; its weights into ``path.data`` where told, or where one file does not hold them."""
    import onnx_ir as ir

    weights = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    if external or (external is None and weights > ONE_FILE):
        ir.save(model, path, external_data=f"{path.name}.data")
    else:
        write_atomic(path, ir.to_proto(model).SerializeToString(deterministic=True))
