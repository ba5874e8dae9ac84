"""What is learned: configurations and initialisers. No model, no tokenizer and no weights file is touched here."""
