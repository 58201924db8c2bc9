"""Recovery: training that regrows what compression cost."""
