"""The multi-hop world: fictional pages, questions over them, tools, an oracle, the agent loop and its score."""
