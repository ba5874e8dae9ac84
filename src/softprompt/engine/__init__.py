"""How prompts meet the model: virtual ids, where they stand in a batch, and the passes that run them."""
