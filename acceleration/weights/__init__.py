"""Checkpoints made of checkpoints: linear combinations (LCSC) and models of fewer blocks (TinyFusion, PPCL)."""
