"""Weighted sum of equally shaped tensors: the one kernel behind every linear forecaster."""

from .reference import weighted_sum

__all__ = ["weighted_sum"]
