"""PROMPT <-> DISK: PEFT's folder, plus ``softprompt.json`` for what PEFT has no place for."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
