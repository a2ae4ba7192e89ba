"""The 1,797 handwritten digits that come inside scikit-learn: real data without a network."""

from __future__ import annotations

import numpy as np
import torch

from espalier.core.errors import NeedError
from espalier.data.images import Images
from espalier.data.sources import SOURCES


def digits() -> Images:
    """uint8 (1797, 1, 8, 8), the set's 0..16 scaled to 0..255. Raises ``NeedError`` without scikit-learn.

    E. Alpaydin, C. Kaynak. Optical Recognition of Handwritten Digits. UCI 1998.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise NeedError("the digits come with scikit-learn, which is missing: pip install 'espalier[demo]'.") from error
    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    return Images(
        torch.from_numpy(pixels).unsqueeze(1),
        torch.from_numpy(data.target.astype(np.int64)),
        SOURCES["digits"].classes,
    )
