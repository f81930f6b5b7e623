"""Text from a model: one engine for the command line, the server, evaluation and reinforcement learning."""
