"""A page of what was recorded, and what its sections have in common."""
