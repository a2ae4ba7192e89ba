"""The rule of every structure against its formula, written out slowly; and hashes that files rely on."""

from __future__ import annotations

import numpy as np
import torch

from espalier.core.structures import Circulant, Hashed, Monarch, TiedKernels, TiedRows, Toeplitz
from espalier.core.structures.arrays import hashes, signs


def numbers(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=count)


def test_circulant_turns_each_row_by_one() -> None:
    structure = Circulant(shape=(5, 7), block=3, flips=1, seed=8)
    parts = structure.split(numbers(structure.count))
    weight, flips = structure.dense(parts), signs(7, 8)
    assert set(flips) == {1, -1}
    for i in range(5):
        for j in range(7):
            assert weight[i, j] == parts["columns"][i // 3, j // 3, 0, (i - j) % 3] * flips[j]


def test_circulant_product_is_a_convolution() -> None:
    structure = Circulant(shape=(6, 6), block=6, flips=0, seed=0)
    column, x = torch.from_numpy(numbers(6)), torch.from_numpy(numbers(6)[::-1].copy())
    product = torch.fft.ifft(torch.fft.fft(column) * torch.fft.fft(x)).real
    assert torch.allclose(structure.dense(structure.split(column)) @ x, product)


def test_circulant_of_a_convolution_is_one_matrix_for_each_position() -> None:
    structure = Circulant(shape=(4, 4, 2, 3), block=2, flips=0, seed=0)
    parts = structure.split(numbers(structure.count))
    weight = structure.dense(parts).reshape(4, 4, 6)
    for position in range(6):
        one = Circulant(shape=(4, 4), block=2, flips=0, seed=0)
        assert np.array_equal(weight[:, :, position], one.dense({"columns": parts["columns"][:, :, [position]]}))


def shift(n: int, f: float) -> np.ndarray:
    found = np.eye(n, k=-1)
    found[0, -1] += f
    return found


def twisted(v: np.ndarray, f: float) -> np.ndarray:
    n = len(v)
    return np.array([[v[i - j] if i >= j else f * v[n + i - j] for j in range(n)] for i in range(n)])


def test_toeplitz_has_the_displacement_and_the_product_form() -> None:
    structure = Toeplitz(shape=(7, 7), rank=3)
    parts = structure.split(numbers(structure.count))
    weight, g, h = structure.dense(parts), parts["g"][0], parts["h"][0]
    displacement = weight - shift(7, 1) @ weight @ shift(7, -1).T
    assert np.allclose(displacement, structure.scale * g.T @ h)
    product = sum(twisted(a, 1) @ twisted(b, -1).T for a, b in zip(g, h, strict=True)) / 2
    assert np.allclose(weight, structure.scale * product)
    assert structure.scale == 1 / 4


def test_toeplitz_that_is_not_square_is_a_row_or_column_of_blocks() -> None:
    for shape, axis in (((3, 8), 1), ((8, 3), 0)):
        structure = Toeplitz(shape=shape, rank=2)
        parts = structure.split(numbers(structure.count))
        square = Toeplitz(shape=(3, 3), rank=2)
        blocks = [square.dense({name: part[[b]] for name, part in parts.items()}) for b in range(3)]
        whole = np.concatenate(blocks, axis)
        assert np.array_equal(structure.dense(parts), whole[: shape[0], : shape[1]])


def test_toeplitz_blocks_are_cut_as_they_are_joined() -> None:
    for shape in ((3, 8), (8, 3), (4, 4)):
        structure = Toeplitz(shape=shape, rank=1)
        matrix = numbers(shape[0] * shape[1]).reshape(shape)
        assert np.array_equal(structure.joined(structure.cut(matrix)), matrix)


def test_monarch_is_two_block_diagonal_matrices_and_permutations() -> None:
    m = 3
    structure = Monarch(shape=(m * m, m * m), blocks=m, rank=1)
    parts = structure.split(numbers(structure.count))
    right = np.zeros((m * m, m * m))  # R: block k maps (k, i) to (k, j)
    left = np.zeros((m * m, m * m))  # L: block j maps (j, k) to (j, l)
    for a in range(m):
        right[a * m : (a + 1) * m, a * m : (a + 1) * m] = parts["right"][a, :, 0, :]
        left[a * m : (a + 1) * m, a * m : (a + 1) * m] = parts["left"][:, a, :, 0].T
    permutation = np.eye(m * m)[np.arange(m * m).reshape(m, m).T.reshape(-1)]  # (k, j) -> (j, k)
    assert np.allclose(structure.dense(parts), permutation @ left @ permutation.T @ right)


def test_monarch_with_one_block_is_low_rank() -> None:
    structure = Monarch(shape=(6, 8), blocks=1, rank=2)
    parts = structure.split(numbers(structure.count))
    assert np.allclose(structure.dense(parts), parts["left"][0, 0] @ parts["right"][0, 0])


def test_hashed_takes_the_bucket_and_the_sign_of_each_position() -> None:
    structure = Hashed(shape=(30, 40), buckets=10, seed=3)
    buckets = numbers(10)
    weight = structure.dense({"buckets": buckets})
    assert set(np.abs(weight).reshape(-1)) == set(np.abs(buckets))
    counts = np.bincount(structure.index.reshape(-1), minlength=10)
    assert counts.min() > 80
    assert counts.max() < 160
    assert abs(structure.signs.mean()) < 0.1
    other = Hashed(shape=(30, 40), buckets=10, seed=4)
    assert np.mean(other.index == structure.index) < 0.2


def test_hashes_never_change() -> None:
    """Files hold only the seed: another hash would make other weights of them."""
    assert [int(value) for value in hashes(3, 0)] == GOLDEN[0]
    assert [int(value) for value in hashes(3, 12345)] == GOLDEN[1]
    assert signs(8, 1).tolist() == GOLDEN[2]
    assert Hashed(shape=(8,), buckets=5, seed=7).index.tolist() == GOLDEN[3]


GOLDEN = [
    [16294208416658607535, 7960286522194355700, 487617019471545679],
    [9156036368700500521, 9335937564220940711, 8146520419295515187],
    [-1, -1, -1, -1, -1, 1, 1, 1],
    [3, 1, 0, 2, 2, 3, 1, 2],
]


def test_tied_rows_and_kernels() -> None:
    rows = TiedRows(shape=(3, 2, 2), index=(1, 0, 1))
    table = numbers(8).reshape(2, 4)
    assert np.array_equal(rows.dense({"rows": table}), table[[1, 0, 1]].reshape(3, 2, 2))
    kernels = TiedKernels(shape=(2, 3, 2, 2))
    parts = kernels.split(numbers(kernels.count))
    wanted = np.einsum("oi,op->oip", parts["scales"], parts["kernels"]).reshape(2, 3, 2, 2)
    assert np.array_equal(kernels.dense(parts), wanted)
