r"""signSGD: of a gradient only the sign is left.

Paper    Bernstein, Wang, Azizzadenesheli, Anandkumar. signSGD: Compressed Optimisation for Non-Convex Problems. ICML
         2018. arXiv:1802.04434
Formula  g~ = sign(g) mean|g|;   unscaled: g~ = sign(g)
Departs  The scale, which the paper leaves to the learning rate, keeps the size that the optimizer and the layers before
         rely on; it is a field. sign(0) = 0, so where nothing flows nothing will.
"""

from __future__ import annotations

from torch import Tensor

from espalier.quantize.gradient_rows import rows


def sign_gradient(gradient: Tensor, *, samples: bool, scaled: bool = True) -> Tensor:
    """The sign of ``gradient``, times the mean of its absolute values if ``scaled``; its shape."""
    flat = rows(gradient, samples=samples)
    found = flat.sign()
    if scaled:
        found = found * flat.abs().mean(1, keepdim=True)
    return found.reshape(gradient.shape).to(gradient.dtype)
