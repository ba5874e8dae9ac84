"""Prompts of keys and values, which stand inside the attention of every layer."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
