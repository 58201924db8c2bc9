"""Coppice: cut language models back, let them regrow, and measure what is left."""

__version__ = "0.1.0"
