"""Nodes in forms that other programs read, each checked against the node's own logits."""
