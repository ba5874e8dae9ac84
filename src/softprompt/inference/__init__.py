"""Using a tuned prompt: answers, label scores, and why an answer ended."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
