"""Sparse attention: token order -> block list -> correction. One plan serves every published pattern."""
