"""Quantization: weights are stored as integers."""
