"""Hosts: the only modules that touch the hooks of the program the engine runs in."""
