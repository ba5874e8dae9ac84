"""The forest: rows packed into one stream, each prompt and each shared beginning computed once."""
