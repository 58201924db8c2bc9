"""Compensation: a small correction is added to what a compressed linear computes."""
