"""What each runtime wants of an int8 file. One row per runtime, facts only; the other files read them.

Sources: onnxruntime, "Quantize ONNX models" (U8S8 on x86, QDQ around an operator and its result) and its QDQ selectors;
OpenVINO, low-precision transformations; NVIDIA, TensorRT developer guide, "Explicit quantization".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from espalier.core.errors import UnknownNameError, did_you_mean
from espalier.deploy.int8.processor import Processor

CARRY = frozenset({"MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
"""Operators that only move numbers: their result is on their input's grid."""


@dataclass(frozen=True, kw_only=True)
class RuntimeProfile:
    """How a runtime wants int8.

    ``signed``: activations are int8, not uint8. ``symmetric``: activations have zero point 0; weights always do.
    ``weight_bits``: bits used of the 8 a weight has. ``int32_bias``: biases are int32 with the scale of the products.
    ``products``: operators with weights, or of two activations, that run in int8. ``needs_result``: those of them that
    only do so when their result is quantized too; ``needs_cut_result``: when it is, behind a Relu or Clip.
    ``follow``: other operators that run in int8 between such.
    ``symmetric_pairs``: both operands of a product of two activations have zero point 0. ``carried``: Q and DQ are also
    written behind operators that only move numbers. ``clip_codes``: a range below 8 bits is cut after rounding, on the
    codes, and not before it. ``one_pass``: a product of matrices and its bias are written as one Gemm.
    ``norm_apart``: a layer norm is kept from being fused with the sum before it, which onnxruntime 1.32 computes ten
    times slower than both alone. ``runs``: whether the runtime can run on this machine when it is installed.
    """

    name: str
    about: str
    signed: bool = False
    symmetric: bool = False
    weight_bits: int = 8
    int32_bias: bool = False
    products: frozenset[str] = frozenset({"Conv", "Gemm", "MatMul"})
    needs_result: frozenset[str] = frozenset()
    needs_cut_result: frozenset[str] = frozenset()
    follow: frozenset[str] = frozenset()
    symmetric_pairs: bool = False
    carried: bool = False
    clip_codes: bool = False
    one_pass: bool = False
    norm_apart: bool = False
    runs: bool = True

    @property
    def container(self) -> str:
        """The dtype of activations."""
        return "int8" if self.signed else "uint8"


PROFILES: Mapping[str, RuntimeProfile] = {
    profile.name: profile
    for profile in (
        RuntimeProfile(
            name="onnxruntime",
            about="uint8 activations, int8 weights per channel; a convolution needs its result quantized too",
            int32_bias=True,
            needs_result=frozenset({"Conv"}),
            needs_cut_result=frozenset({"Gemm"}),
            follow=frozenset({"Add", "Mul", "Concat", "Sigmoid", "LeakyRelu", "GlobalAveragePool", "AveragePool"}),
            carried=True,
            clip_codes=True,
            one_pass=True,
            norm_apart=True,
        ),
        RuntimeProfile(
            name="openvino",
            about="uint8 activations, int8 weights per channel; results may stay in fp32",
            products=frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"}),
            follow=frozenset({"Add", "Mul", "Concat", "GlobalAveragePool", "AveragePool"}),
            symmetric_pairs=True,
        ),
        RuntimeProfile(
            name="tensorrt",
            about="int8 activations and weights, zero point 0 everywhere, fp32 biases",
            signed=True,
            symmetric=True,
            products=frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"}),
            follow=frozenset({"Add", "Concat", "GlobalAveragePool", "AveragePool"}),
            runs=False,
        ),
    )
}


def profile_of(runtime: str, processor: Processor) -> RuntimeProfile:
    """The profile of ``runtime`` on ``processor``. Raises ``UnknownNameError`` for a runtime without one."""
    if runtime not in PROFILES:
        raise UnknownNameError(f"there is no int8 profile for {runtime!r}.{did_you_mean(runtime, PROFILES)}")
    profile = PROFILES[runtime]
    return replace(profile, weight_bits=processor.weight_bits) if profile.runs else profile
