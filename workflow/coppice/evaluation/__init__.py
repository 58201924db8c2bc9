"""Measurements of a node: one measurement, one file."""
