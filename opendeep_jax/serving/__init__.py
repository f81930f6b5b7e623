"""Models that talk: over HTTP as OpenAI's API has it, and in the terminal."""
