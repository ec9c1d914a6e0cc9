"""Quantized weights: layouts, recipes, the streaming writer and the readers."""
