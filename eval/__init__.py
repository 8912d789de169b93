"""Worlds to examine agents in, the loop that examines them, and what sharing a cache does to their answers."""
