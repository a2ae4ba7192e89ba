"""What the processor here can do with 8-bit numbers, and whether products of 8-bit numbers saturate on it.

Without dot-product instructions (VNNI, AMX) x86 multiplies pairs of 8-bit numbers into 16 bits: 2 * 255 * 127 does not
fit, the sum is cut, and accuracy is lost silently. With weights of 7 bits it fits. Source: Intel, Software Developer's
Manual, VPMADDUBSW and VPDPBUSD.
"""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

DOT_PRODUCTS = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx_vnni_int8": "AVX-VNNI-INT8",
    "asimddp": "Arm dot products",
    "i8mm": "Arm 8-bit matrix products",
}
"""Features that sum 8-bit products in 32 bits, as Linux names them, and their names for people."""

VECTORS = {"avx512bw": "AVX-512", "avx2": "AVX2", "sse4_1": "SSE4.1", "asimd": "Arm NEON"}
BF16 = ("amx_bf16", "avx512_bf16", "bf16")


@dataclass(frozen=True)
class Processor:
    """``name`` of the model; ``features`` as Linux names them, empty where the system does not tell."""

    name: str
    features: frozenset[str] = frozenset()

    @property
    def known(self) -> bool:
        """Whether the system told what the processor has."""
        return bool(self.features)

    @property
    def saturates(self) -> bool:
        """Whether sums of 8-bit products can be cut; what is unknown counts as yes."""
        return not self.features & DOT_PRODUCTS.keys()

    @property
    def weight_bits(self) -> int:
        """Bits of a weight with which no product is cut: 8, or 7 where 8 would saturate."""
        return 7 if self.saturates else 8

    @property
    def bf16(self) -> bool:
        """Whether bf16 products are computed by instructions of their own."""
        return bool(self.features.intersection(BF16))

    def __str__(self) -> str:
        if not self.known:
            return f"{self.name}: what it can do is unknown here, so weights have 7 bits and no product saturates"
        found = [said for key, said in DOT_PRODUCTS.items() if key in self.features]
        if found:
            return f"{self.name} has {' and '.join(found)}: weights have 8 bits"
        vector = next((said for key, said in VECTORS.items() if key in self.features), "no vector unit known here")
        return f"{self.name} has {vector} but no 8-bit dot products: weights have 7 bits, as 8 would saturate"


def this_processor() -> Processor:
    """The processor of this machine: from ``/proc/cpuinfo`` or macOS's ``sysctl``; elsewhere unknown."""
    if CPUINFO.is_file():
        return from_cpuinfo(CPUINFO.read_text(errors="replace"))
    if platform.system() == "Darwin":
        return _from_sysctl()
    return Processor(platform.processor() or platform.machine() or "this processor")


def from_cpuinfo(text: str) -> Processor:
    """Read the first processor of ``/proc/cpuinfo``."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), value.strip())
    flags = fields.get("flags") or fields.get("features") or ""
    name = fields.get("model name") or platform.machine() or "this processor"
    return Processor(name, frozenset(flags.lower().split()))


def _from_sysctl() -> Processor:
    def ask(key: str) -> str:
        try:
            found = subprocess.run(["/usr/sbin/sysctl", "-n", key], capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return found.stdout.strip()

    flags = f"{ask('machdep.cpu.features')} {ask('machdep.cpu.leaf7_features')}".lower().split()
    flags = [{"avx512vnni": "avx512_vnni", "sse4.1": "sse4_1"}.get(flag, flag) for flag in flags]
    arm = {"hw.optional.arm.FEAT_DotProd": "asimddp", "hw.optional.arm.FEAT_I8MM": "i8mm",
           "hw.optional.arm.FEAT_BF16": "bf16", "hw.optional.AdvSIMD": "asimd"}  # fmt: skip
    flags += [flag for key, flag in arm.items() if ask(key) == "1"]
    return Processor(ask("machdep.cpu.brand_string") or platform.machine(), frozenset(flags))
