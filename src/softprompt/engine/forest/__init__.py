"""The forest: rows packed into one stream, each prompt and each shared beginning computed once."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
