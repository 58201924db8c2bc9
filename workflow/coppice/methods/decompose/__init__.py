"""Decomposition: a linear becomes a product of smaller ones."""
