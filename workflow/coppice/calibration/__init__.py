"""Calibration: one walk over a node's model gathers statistics for every step that starts there; one file a kind."""
