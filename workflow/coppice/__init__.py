"""Coppice: cut language models back, let them regrow, and measure what is left."""
