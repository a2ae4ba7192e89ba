"""The one exception tree. Every message says what was received, what is allowed and what to do.

EspalierError
├── UsageError            a wrong argument, field, name or option
│   └── UnknownNameError  a name that nothing answers to ("did you mean ...")
├── NeedError             a step needs something the task, the model or the machine does not offer
├── DataError             a data folder, loader or batch that cannot be used
├── ModelError            a model that cannot be run, traced, copied or rebuilt
├── NumericError          NaN or infinity where numbers are needed
├── PhaseError            a step would destroy what an earlier step fixed (masks, codes)
├── TargetError           a target that is out of reach; names the gap
├── RunError              a run directory that cannot be used, resumed or written
└── FileError             an .espalier file that is refused
    ├── NotOurFile        no .espalier file at all
    ├── UnsupportedVersion
    ├── Corrupt           damaged or forged
    └── LimitExceeded     asks for more elements or bytes than allowed

EspalierWarning(UserWarning)
└── NoEffectWarning       a technique that changed nothing
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EspalierError(Exception):
    """Root of everything espalier raises on purpose."""


class UsageError(EspalierError):
    """A wrong argument, field or option."""


class UnknownNameError(UsageError):
    """A name that nothing answers to."""


class NeedError(EspalierError):
    """Something a step needs is not there."""


class DataError(EspalierError):
    """Data that cannot be read or used."""


class ModelError(EspalierError):
    """A model that cannot be run, traced, copied or rebuilt."""


class NumericError(EspalierError):
    """NaN or infinity where numbers are needed."""


class PhaseError(EspalierError):
    """A step would destroy what an earlier step fixed."""


class TargetError(EspalierError):
    """A target that is out of reach."""


class RunError(EspalierError):
    """A run directory that cannot be used, resumed or written."""


class FileError(EspalierError):
    """An .espalier file that is refused."""


class NotOurFile(FileError):
    """The bytes are no .espalier file."""


class UnsupportedVersion(FileError):
    """An .espalier file of a version or with a flag this reader does not know."""


class Corrupt(FileError):
    """A damaged or forged .espalier file."""


class LimitExceeded(FileError):
    """A file that asks for more elements or bytes than the reader allows."""


class EspalierWarning(UserWarning):
    """Root of espalier's warnings."""


class NoEffectWarning(EspalierWarning):
    """A technique that changed nothing."""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the closest allowed name, or the list of what is allowed.

    ``name`` is what was received; ``allowed`` what would have been accepted.
    """
    names = sorted(set(allowed))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return " Did you mean " + " or ".join(repr(n) for n in close) + "?"
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return f" Allowed: {shown}." if names else " Nothing is allowed here."
