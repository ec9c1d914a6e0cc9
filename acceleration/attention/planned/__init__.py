"""Attention that follows a plan: what each head does at each step, from a file or a published schedule."""
