"""The multi-hop world: made-up pages, questions that only they answer, tools to read them."""
