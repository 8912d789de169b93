"""LRAgent: one decomposed KV cache for a team of LoRA roles (after arXiv 2602.01053)."""

__version__ = "0.1.0"
