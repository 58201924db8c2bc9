"""Texts: their sources, disjoint splits and windows of tokens, and the built-in world of biographies."""
