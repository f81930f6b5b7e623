"""Numbers, pages, charts and progress bars for people to read. No JAX."""
