"""What a model knows and can do: perplexity of texts, and the tasks of lm-evaluation-harness."""
