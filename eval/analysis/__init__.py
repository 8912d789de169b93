"""What roles leave in their caches, and what sharing them does to the next token: why sharing costs what it costs."""
