"""PEFT's interface: named prompts, with their heads, as one module on a frozen model. Nothing inside imports it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
