"""A pickle read as data: dicts, lists, tuples, strings, bytes, integers and uint8 NumPy arrays, nothing else.

No name that the file gives is imported, looked up or called: the three names with which NumPy writes an array are
compared as text. Opcodes: protocols 2 to 4 as written by Python 2 (the official CIFAR archives) and 3.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class _Name:
    text: str


@dataclass(eq=False)
class _Array:
    values: NDArray[np.uint8] | None = None


_MARK, _UINT8 = object(), object()
_RECONSTRUCT = (_Name("numpy.core.multiarray _reconstruct"), _Name("numpy._core.multiarray _reconstruct"))
_NDARRAY, _DTYPE = _Name("numpy ndarray"), _Name("numpy dtype")


@dataclass
class _Machine:
    data: bytes
    at: int = 0
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, inside a value of {count} bytes")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 256)
        if end < 0:
            raise ValueError("a name in it has no end")
        return self.take(end + 1 - self.at)[:-1].decode("ascii")

    def above_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while at >= 0 and self.stack[at] is not _MARK:
            at -= 1
        if at < 0:
            raise ValueError("its stack lacks a mark")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def pop(self, count: int) -> list[Any]:
        items = self.stack[len(self.stack) - count :]
        if len(self.stack) < count or any(item is _MARK for item in items):
            raise ValueError("its stack is too short")
        del self.stack[len(self.stack) - count :]
        return items

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise ValueError(f"a {kind.__name__} should be on its stack")
        return self.stack[-1]


def parse_pickle(data: bytes) -> Any:
    """The value a pickle holds; nothing is executed. Raises ``ValueError`` for anything but plain data.

    Python 2 strings come out as bytes. Time and memory are linear in ``len(data)``.
    """
    machine = _Machine(data)
    while True:
        code = machine.take(1)
        if code == b".":
            break
        if code in _VALUES:
            machine.stack.append(_VALUES[code](machine))
        elif code in _ACTIONS:
            _ACTIONS[code](machine)
        else:
            raise ValueError(f"its byte {machine.at - 1} asks for {code!r}, which is more than plain data")
    (value,) = machine.pop(1)
    if machine.stack or machine.at != len(data):
        raise ValueError("it goes on after its value")
    return _finished(value)


def _finished(value: Any) -> Any:
    """The top level with its arrays filled in; an array that was begun and never filled is refused."""
    if type(value) is dict:
        return {key: _finished(item) if type(item) is _Array else item for key, item in value.items()}
    if type(value) is not _Array:
        return value
    if value.values is None:
        raise ValueError("an array in it has no values")
    return value.values


def _remembered(m: _Machine, key: int) -> Any:
    if key not in m.memo:
        raise ValueError(f"it refers to item {key}, which it did not store")
    return m.memo[key]


def _store(m: _Machine, key: int) -> None:
    if not m.stack or m.stack[-1] is _MARK:
        raise ValueError("it stores an item that is not there")
    m.memo[key] = m.stack[-1]


def _name(module: object, attribute: object) -> _Name:
    name = _Name(f"{module} {attribute}")
    if name not in (*_RECONSTRUCT, _NDARRAY, _DTYPE):
        raise ValueError(f"it names {name.text!r}; only NumPy's arrays are known, and nothing is imported")
    return name


def _stack_name(m: _Machine) -> None:
    module, attribute = m.pop(2)
    if type(module) is not str or type(attribute) is not str:
        raise ValueError("a name in it is no text")
    m.stack.append(_name(module, attribute))


def _tuple(m: _Machine, count: int) -> None:
    m.stack.append(tuple(m.pop(count)))


def _extend(m: _Machine, items: list[Any]) -> None:
    m.top(list).extend(items)


def _set(m: _Machine, items: list[Any]) -> None:
    if len(items) % 2 or not all(type(key) in (str, bytes) for key in items[::2]):
        raise ValueError("a dict in it has keys other than strings")
    m.top(dict).update(zip(items[::2], items[1::2], strict=True))


def _reduce(m: _Machine) -> None:
    """Two calls are known, and none is made: an array's beginning, and the data type uint8."""
    name, arguments = m.pop(2)
    if type(name) is _Name and type(arguments) is tuple and len(arguments) == 3:
        first, second, third = arguments
        if name in _RECONSTRUCT and first == _NDARRAY and second == (0,) and third == b"b":
            m.stack.append(_Array())
            return
        if name == _DTYPE and first in (b"u1", "u1") and second in (0, False) and third in (1, True):
            m.stack.append(_UINT8)
            return
    raise ValueError(f"it asks to call {name.text if type(name) is _Name else 'something'!r}; nothing is called here")


def _build(m: _Machine) -> None:
    """The state of the uint8 type, or of an array: version, shape, type, column-major?, bytes."""
    target, state = m.pop(2)
    if target is _UINT8 and state in ((3, b"|", None, None, None, -1, -1, 0), (3, "|", None, None, None, -1, -1, 0)):
        m.stack.append(target)
        return
    if type(target) is _Array and target.values is None and type(state) is tuple and len(state) == 5:
        version, shape, kind, column_major, content = state
        sized = type(shape) is tuple and len(shape) <= 8 and all(type(n) is int and n >= 0 for n in shape)
        if version == 1 and kind is _UINT8 and sized and type(content) is bytes and type(column_major) in (bool, int):
            if math.prod(shape) != len(content):
                raise ValueError(f"an array in it has the shape {shape} and {len(content)} bytes")
            order: Any = "F" if column_major else "C"
            target.values = np.frombuffer(content, dtype=np.uint8).reshape(shape, order=order)
            m.stack.append(target)
            return
    raise ValueError("it holds an object other than a uint8 array")


_VALUES: dict[bytes, Callable[[_Machine], Any]] = {
    b"N": lambda _: None,
    b"\x88": lambda _: True,
    b"\x89": lambda _: False,
    b"]": lambda _: [],
    b"}": lambda _: {},
    b")": lambda _: (),
    b"(": lambda _: _MARK,
    b"K": lambda m: m.number("<B"),
    b"M": lambda m: m.number("<H"),
    b"J": lambda m: m.number("<i"),
    b"U": lambda m: m.take(m.number("<B")),
    b"T": lambda m: m.take(m.number("<i")),
    b"C": lambda m: m.take(m.number("<B")),
    b"B": lambda m: m.take(m.number("<I")),
    b"X": lambda m: m.take(m.number("<I")).decode(),
    b"\x8c": lambda m: m.take(m.number("<B")).decode(),
    b"c": lambda m: _name(m.line(), m.line()),
    b"h": lambda m: _remembered(m, m.number("<B")),
    b"j": lambda m: _remembered(m, m.number("<I")),
}
_ACTIONS: dict[bytes, Callable[[_Machine], object]] = {
    b"\x80": lambda m: m.take(1),
    b"\x95": lambda m: m.take(8),
    b"q": lambda m: _store(m, m.number("<B")),
    b"r": lambda m: _store(m, m.number("<I")),
    b"\x94": lambda m: _store(m, len(m.memo)),
    b"\x93": _stack_name,
    b"\x85": lambda m: _tuple(m, 1),
    b"\x86": lambda m: _tuple(m, 2),
    b"\x87": lambda m: _tuple(m, 3),
    b"t": lambda m: m.stack.append(tuple(m.above_mark())),
    b"a": lambda m: _extend(m, m.pop(1)),
    b"e": lambda m: _extend(m, m.above_mark()),
    b"s": lambda m: _set(m, m.pop(2)),
    b"u": lambda m: _set(m, m.above_mark()),
    b"R": _reduce,
    b"b": _build,
}
