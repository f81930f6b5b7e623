"""Serving of models over HTTP with OpenAI's API, and chat in the terminal."""
