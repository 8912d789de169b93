"""Flash-LoRA-Attention and the small products around it. Knows torch (and Triton) only."""
