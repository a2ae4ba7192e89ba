from __future__ import annotations

import inspect

import pytest
import torch

from espalier.core.errors import ModelError
from espalier.graph.operators import BY_ATEN, BY_CODE, TABLE, operator_named
from espalier.graph.operators.schema import parse_signature, torch_dtype

SECTION_SIX = (
    "conv2d linear matmul einsum scaled_dot_product_attention batch_norm layer_norm group_norm add.Tensor "
    "sub.Tensor mul.Tensor div.Tensor pow.Tensor_Scalar neg exp sin cos clamp square cat stack chunk "
    "split.Tensor split_with_sizes slice.Tensor select.int unbind.int index.Tensor roll pad repeat expand "
    "masked_fill.Scalar reshape view flatten.using_ints unflatten.int permute transpose.int swapaxes "
    "squeeze.dim unsqueeze max_pool2d avg_pool2d adaptive_avg_pool2d mean.dim softmax.int linalg_vector_norm "
    "cumsum arange zeros relu gelu silu hardswish hardsigmoid sigmoid tanh relu6 hardtanh leaky_relu elu mish "
    "softplus conv1d conv3d conv_transpose2d.input bmm baddbmm instance_norm where.self lstm.input gru.input "
    "rnn_tanh.input embedding full log_softmax.int sum.dim_IntList max.dim upsample_nearest2d.vec "
    "upsample_bilinear2d.vec "
)


def overloads():
    for target, operator in BY_ATEN.items():
        name, overload = target.split(".")
        if name != "_operator":
            yield target, operator, getattr(getattr(torch.ops.aten, name), overload)._schema


def test_codes_and_names_are_unique():
    assert len(BY_CODE) == len(TABLE)
    assert len(BY_ATEN) == sum(len(op.aten) for op in TABLE.values())


def test_every_listed_overload_exists_and_takes_our_arguments():
    assert sum(1 for _ in overloads()) > 250
    for target, operator, schema in overloads():
        theirs = {operator.rename.get(a.name, a.name) for a in schema.arguments}
        needed = {p.name for p in operator.parameters if p.required}
        assert needed <= theirs, target


def test_defaults_are_torchs_own():
    """A default is left out of the file, so it must mean what torch means; the exceptions are filled in."""
    different = set()
    for _, operator, schema in overloads():
        ours = {p.name: p for p in operator.parameters}
        for argument in schema.arguments:
            mine = ours.get(operator.rename.get(argument.name, argument.name))
            if mine is None or not argument.has_default_value() or mine.required:
                continue
            default = list(mine.default) if isinstance(mine.default, tuple) else mine.default
            default = torch_dtype(default) if mine.kind == "d" and default else default
            if default != argument.default_value:
                different.add((operator.name, mine.name))
    written_by_the_normaliser = {("var", "correction"), ("std", "correction"), ("pad", "value")}
    a_word_or_a_list = {(f"conv{n}d", "padding") for n in (1, 2, 3)}
    assert different == written_by_the_normaliser | a_word_or_a_list


def test_the_operators_of_the_survey_are_covered():
    missing = [t for t in SECTION_SIX.split() if (t if "." in t else f"{t}.default") not in BY_ATEN]
    assert missing == []


def test_codes_never_change():
    """A sample of the file format; a changed code would make old files unreadable."""
    frozen = {"conv1d": 1, "conv2d": 2, "linear": 7, "lstm": 15, "batch_norm": 20, "add": 30, "scale_shift": 46,
              "dropout": 47, "neg": 70, "relu": 106, "reshape": 150, "flatten": 151, "pad": 166, "cat": 180,
              "slice": 187, "size": 220, "max_pool2d": 231, "avg_pool2d": 235, "adaptive_avg_pool2d": 238,
              "mean": 260, "softmax": 273}  # fmt: skip
    assert {name: TABLE[name].code for name in frozen} == frozen


def test_signatures_are_read_as_documented():
    stride, scale, mode = parse_signature("stride:P=[1,1] *scale:f?=None *mode:{a,b}='a'")
    assert (stride.kind, stride.default, stride.required, stride.keyword) == ("P", (1, 1), False, False)
    assert (scale.kind, scale.optional, scale.keyword) == ("f", True, True)
    assert mode.words == ("a", "b")


def test_unknown_operator_is_named_with_a_suggestion():
    with pytest.raises(ModelError, match="conv2d"):
        operator_named("conv2")


def test_runners_are_called_with_the_table_s_order():
    """Positional order of the table is the function's own wherever Python can tell."""
    for operator in TABLE.values():
        try:
            signature = inspect.signature(operator.run)
        except (TypeError, ValueError):
            continue
        kinds = [p.kind for p in signature.parameters.values()]
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            continue
        positional = [p for p in operator.parameters if not p.keyword]
        assert len(positional) <= sum(kind in (0, 1) for kind in kinds), operator.name


def test_defaults_torch_does_not_declare_never_change():
    """They stand in no file, so files of today would mean something else tomorrow."""
    frozen = {
        ("batch_norm", "momentum"): 0.1,
        ("batch_norm", "eps"): 1e-5,
        ("batch_norm", "training"): False,
        ("instance_norm", "use_input_stats"): True,
        ("instance_norm", "eps"): 1e-5,
        ("dropout", "p"): 0.5,
        ("lstm", "dropout"): 0.0,
        ("lstm", "batch_first"): False,
        ("var", "correction"): 1,
        ("pad", "value"): None,
        ("arange", "step"): 1,
    }
    for (operator, name), default in frozen.items():
        assert next(p.default for p in TABLE[operator].parameters if p.name == name) == default
