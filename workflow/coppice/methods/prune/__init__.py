"""Pruning: weights, key/value groups, neurons or blocks are removed."""
