"""Channel identities through a graph: which channels can go together, and the graph without them."""

from espalier.graph.channels import cost
from espalier.graph.channels.groups import ChannelGroups, Group, Place, Protected, channel_groups

__all__ = ["ChannelGroups", "Group", "Place", "Protected", "channel_groups", "cost"]
