"""Named recipes: where methods meet."""

from espalier.core.registry import register
from espalier.recipes.deep_compression import DeepCompression
from espalier.recipes.federated import Federated
from espalier.recipes.iterate_until import IterateUntil
from espalier.recipes.low_rank_int8 import LowRankInt8
from espalier.recipes.mobile_int8 import MobileInt8
from espalier.recipes.new_head import NewHead
from espalier.recipes.order import harmful
from espalier.recipes.prune_quantize import PruneQuantize
from espalier.recipes.prune_quantize_distill import PruneQuantizeDistill
from espalier.recipes.ternary_network import TernaryNetwork
from espalier.recipes.transfer import Transfer

METHODS = register(
    "recipes",
    (
        *(DeepCompression, PruneQuantize, PruneQuantizeDistill, LowRankInt8, TernaryNetwork, MobileInt8),
        *(NewHead, Transfer, Federated, IterateUntil),
    ),
)

__all__ = [
    "METHODS",
    "DeepCompression",
    "Federated",
    "IterateUntil",
    "LowRankInt8",
    "MobileInt8",
    "NewHead",
    "PruneQuantize",
    "PruneQuantizeDistill",
    "TernaryNetwork",
    "Transfer",
    "harmful",
]
