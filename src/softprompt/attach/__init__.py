"""The HF-style module users hold: named prompts on one frozen model, reversible."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
