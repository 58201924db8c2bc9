"""Compensation: a small correction is added beside a compressed linear."""
