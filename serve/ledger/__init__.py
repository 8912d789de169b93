"""Token economics: what each request cost, kept in a file, priced, and held within budgets. Knows nothing of HTTP."""
