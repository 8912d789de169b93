"""Several engines behind one service: one process and one GPU each, started and watched by Ray Serve."""
