"""A training run's state as flat tensors beside plain JSON data, both ways; no pickle.

JSON knows no tensors, tuples, integer keys or infinities: these travel as one-key mappings ``{"$tensor": name}``,
``{"$tuple": [...]}``, ``{"$items": [[key, value], ...]}`` and ``{"$float": "inf"}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from espalier.core.errors import UsageError


def pack(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """``value`` as JSON data; its tensors go into ``tensors``, on the CPU, contiguous, each storage view once.

    The tensors may share memory with ``value``. Raises ``UsageError`` for what is neither tensor nor plain data.
    """
    return _Packer(tensors).pack(value, path)


class _Packer:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.seen: dict[tuple[Any, ...], str] = {}

    def pack(self, value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return {"$tensor": self.keep(value.detach(), path)}
        if isinstance(value, float):
            return value if math.isfinite(value) else {"$float": str(value)}
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, Mapping):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: self.pack(item, f"{path}/{key}" if path else key) for key, item in value.items()}
            return {"$items": [[self.pack(k, path), self.pack(item, f"{path}/{k}")] for k, item in value.items()]}
        if isinstance(value, (list, tuple)):
            items = [self.pack(item, f"{path}/{place}") for place, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        raise UsageError(
            f"the training state holds a {type(value).__name__} at {path!r}; a state_dict() may hold tensors, numbers, "
            "strings, None, lists, tuples and mappings of these."
        )

    def keep(self, tensor: Tensor, path: str) -> str:
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and identity in self.seen:
            return self.seen[identity]
        name = path
        while name in self.tensors:
            name += "'"
        self.tensors[name] = tensor.cpu().contiguous()
        return self.seen.setdefault(identity, name)


def unpack(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What :func:`pack` was given."""
    if isinstance(data, list):
        return [unpack(item, tensors) for item in data]
    if not isinstance(data, Mapping):
        return data
    if len(data) == 1:
        ((tag, content),) = data.items()
        if tag == "$tensor":
            return tensors[content]
        if tag == "$tuple":
            return tuple(unpack(item, tensors) for item in content)
        if tag == "$items":
            return {unpack(key, tensors): unpack(item, tensors) for key, item in content}
        if tag == "$float":
            return float(content)
    return {key: unpack(item, tensors) for key, item in data.items()}


def snapshot(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a module's state that later training does not change."""
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in state.items()}
