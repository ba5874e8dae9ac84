"""The name that the installed transformers gives a model's cache, among its arguments and in its outputs."""

from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = "cache" if "cache" in vars(CausalLMOutputWithPast) else "past_key_values"
