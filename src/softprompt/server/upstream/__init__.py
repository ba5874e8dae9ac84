"""Answers and scores computed by vLLM servers: what is sent to them, what they say of themselves, how they fail."""
