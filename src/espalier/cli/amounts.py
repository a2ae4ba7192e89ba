"""The amounts of ``espalier prune``: how they are written, and which options go together."""

from __future__ import annotations

import re
from typing import Any

from espalier.core.errors import UsageError

MEASURES = {"channels": "units", "parameters": "parameters", "macs": "macs", "size": "bytes", "ms": "ms"}
_FACTORS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1.0, "kB": 1e3, "MB": 1e6, "KiB": 1024.0, "MiB": 1048576.0}
_ALLOWED = {
    "channels": "the share of the units to remove (50%, from 0 to below 100), or how many times fewer stay (2x)",
    "sparsity": "the share of the weights that become zero (90% or 0.9, from 0 to below 100 %), or how many times "
    "fewer stay (10x)",
}


def parse_amount(text: str, what: str) -> tuple[float | None, float | None]:
    """``(share to remove, None)`` for ``50%`` and ``2x``, ``(None, what may stay)`` for ``200k``, ``1.5MB`` or ``5``.

    ``what``: the option it came by; a share of single weights may be a fraction. Raises ``UsageError`` for anything
    else, for a share outside 0 to 100 %, and for less than one parameter, multiply-add or byte.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|x|[kMG]|[kM]?B|[KM]iB|ms)?\s*", text)
    number, unit = (float(found[1]), found[2] or "") if found else (0.0, "")
    bare = found is not None and not unit
    share = number / 100 if unit == "%" else 1 - 1 / number if unit == "x" and number else None
    share = number if bare and what == "sparsity" else share
    if found and share is not None and 0 <= share < 1:
        return share, None
    unit = "" if unit == "ms" and what == "ms" else unit
    least = 0.0 if what == "ms" else 1.0
    left = number * _FACTORS[unit] if found and share is None and unit in _FACTORS else 0.0
    if left > 0 and left >= least and what not in _ALLOWED:
        return None, left
    usual = (
        "the share to remove (50%, from 0 to below 100), how many times less (2x), or what may stay "
        + {"size": "(200kB, 1.5MB)", "ms": "(5)"}.get(what, "(200k, 1.5M)")
    )  # fmt: skip
    percent = 100 * number if number < 1 else number if number > 1 and what in _ALLOWED else 100
    meant = f" Did you mean {percent:g}%?" if bare and 0 < percent < 100 else ""
    raise UsageError(f"--{what} {text!r} is not understood: write {_ALLOWED.get(what, usual)}.{meant}")


def check_options(
    amounts: dict[str, str | None], fields: dict[str, Any], multiple: int | None, part: str | None, *, analyse: bool
) -> None:
    """Raise ``UsageError`` for options that would have no say together."""
    given = [name for name, text in amounts.items() if text is not None]
    options = ", ".join(f"--{name}" for name in given)
    if len(given) > 1:
        raise UsageError(f"give one of {', '.join(f'--{name}' for name in amounts)}; got {options}.")
    structural = {"--part": part is not None, "--multiple": multiple is not None, "--analyse": analyse}
    if not given and ((fields["pattern"] is None and fields["criterion"] is None) or any(structural.values())):
        raise none_given()
    masking = given in ([], ["sparsity"])
    for option, is_set in structural.items():
        if masking and is_set:
            raise UsageError(
                f"{option} is about channels and heads that are removed; --sparsity masks single weights. Leave one of "
                "the two out, or remove channels: --channels 50%."
            )
    if fields["pattern"] is not None and not masking:
        raise UsageError(
            f"--pattern {fields['pattern']} says which single weights go together; {options} removes channels (with "
            "--part, heads). Leave --pattern out, or mask weights: --sparsity 90% in the place of "
            f"{options}."
        )
    if fields["schedule"] not in (None, "one-shot") and not fields["epochs"]:
        raise UsageError(
            f"--schedule {fields['schedule']} says how much is gone after each epoch, and there are none. Give "
            "--epochs, or leave --schedule out."
        )


def none_given() -> UsageError:
    """What to say where nothing says how much is to go."""
    among = ", ".join(f"--{name}" for name in MEASURES)
    return UsageError(f"say how much is to go: give one of {among}, or --sparsity for single weights; got none.")
