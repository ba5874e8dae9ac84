"""Many rows that grow token by token, each behind its own prompt."""
