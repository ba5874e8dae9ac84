"""Prompts of keys and values, which stand inside the attention of every layer."""
