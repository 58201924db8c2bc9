"""Compression steps: a layer method's pass over the blocks, allocation of targets, structural removal."""
