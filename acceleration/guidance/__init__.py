"""Guidance reduction: classifier-free guidance without asking the unconditional branch at every step."""
