"""The parts of the int8 export that need no runtime: processors, grids, codes, counting noise."""

from __future__ import annotations

import numpy as np
import pytest

from espalier.core.errors import NumericError, UnknownNameError
from espalier.core.representation import Affine, Masked
from espalier.deploy.int8.grid import Grid, from_range, placed
from espalier.deploy.int8.processor import Processor, from_cpuinfo, this_processor
from espalier.deploy.int8.profile import PROFILES, profile_of
from espalier.deploy.int8.weights import encode, fixed_codes

ORT, TRT = PROFILES["onnxruntime"], PROFILES["tensorrt"]
VNNI = "model name\t: Some CPU\nflags\t\t: fpu avx2 avx512f avx512bw avx512_vnni\n"


def test_processors() -> None:
    new = from_cpuinfo(VNNI)
    assert (new.weight_bits, new.saturates) == (8, False)
    assert "AVX-512 VNNI" in str(new)
    old = from_cpuinfo("model name : Older\nflags : fpu avx2\n")
    assert old.weight_bits == 7
    assert "would saturate" in str(old)
    assert from_cpuinfo("Features\t: fp asimd asimddp\n").weight_bits == 8
    unknown = Processor("something")
    assert unknown.weight_bits == 7
    assert "unknown" in str(unknown)
    assert str(this_processor())


def test_profiles_follow_the_processor() -> None:
    assert profile_of("openvino", Processor("old", frozenset({"avx2"}))).weight_bits == 7
    assert profile_of("tensorrt", Processor("old", frozenset({"avx2"}))).weight_bits == 8
    with pytest.raises(UnknownNameError, match="Did you mean 'openvino'"):
        profile_of("openvno", Processor("any"))


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 4.0), (-5.0, -1.0), (0.0, 1e-6)])
def test_grids_hold_zero_and_the_range(low: float, high: float) -> None:
    for profile in (ORT, TRT):
        grid = from_range(low, high, profile, "x")
        first, last = grid.range
        assert first <= min(low, 0) + grid.scale
        assert last >= max(high, 0) - grid.scale
        assert grid.low <= grid.zero_point <= grid.high
        assert profile is ORT or grid.zero_point == 0
    assert from_range(-1, 3, ORT, "x", symmetric=True).container == "int8"
    assert from_range(0, 3, ORT, "x", symmetric=True) == from_range(0, 3, ORT, "x")


@pytest.mark.parametrize("bad", [(0.0, 0.0), (float("inf"), float("-inf")), (0.0, float("nan")), (0.0, 1e38)])
def test_ranges_without_a_scale_are_refused(bad: tuple[float, float]) -> None:
    with pytest.raises(NumericError, match="layer/x"):
        from_range(*bad, ORT, "layer/x")


def test_trained_grids_move_into_the_container_with_the_same_values() -> None:
    signed = Grid(0.5, 0, -8, 7, "int8", trained=True)
    moved = placed(signed, ORT)
    assert moved is not None
    assert (moved.range, moved.zero_point, moved.container) == (signed.range, 8, "uint8")
    assert placed(signed, TRT) == Grid(0.5, 0, -8, 7, "int8", trained=True)
    assert placed(Grid(0.5, 10, 0, 255, "uint8", trained=True), TRT) is None


def test_rounding_is_half_a_step_per_channel_and_symmetric() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32)
    weight[2] = 0
    for bits in (8, 7):
        for axis in (0, 1):
            found = encode(weight, axis, bits, [], "w")
            view = [-1 if place == axis else 1 for place in range(3)]
            back = found.codes * found.scale.reshape(view)
            assert (np.abs(back - weight) <= 0.5001 * found.scale.reshape(view)).all()
            assert int(np.abs(found.codes.astype(int)).max()) == 2 ** (bits - 1) - 1


def test_masked_and_shifted_codes_are_found() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (3, 4)).astype(np.uint8)
    shifted = Affine(
        shape=(3, 4), codes=codes, scale=np.full(3, 0.5, np.float32), zero_point=np.full(3, 8, np.int32),
        bits_per_code=4, axis=0,
    )  # fmt: skip
    found = encode(shifted.dense(), 0, 8, fixed_codes({"w": shifted}, {}), "w")
    assert found.kept
    assert np.array_equal(found.codes, codes.astype(int) - 8)
    mask = rng.random((3, 4)) > 0.5
    inner = Affine(
        shape=(int(mask.sum()),), codes=codes[mask], scale=np.float32(0.5).reshape(()),
        zero_point=np.int32(0).reshape(()), bits_per_code=4,
    )  # fmt: skip
    masked = Masked(shape=(3, 4), mask=mask, inner=inner)
    found = encode(masked.dense(), 0, 8, fixed_codes({"w": masked}, {}), "w")
    assert found.kept
    assert np.array_equal(found.codes, np.where(mask, codes, 0))


def test_a_scale_grows_until_the_bias_fits() -> None:
    weight = np.full((2, 3), 1e-3, np.float32)
    least = np.array([0.0, 1.0])
    found = encode(weight, 0, 8, [], "w", at_least=least)
    assert found.scale[0] == pytest.approx(1e-3 / 127)
    assert found.scale[1] == 1
