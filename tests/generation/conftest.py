from oracles.byte_models import answer_log_prob, bart, llama, t5, tokenizer

__all__ = ["answer_log_prob", "bart", "llama", "t5", "tokenizer"]
