"""PROMPT <-> DISK: PEFT's folder plus ``softprompt.json``, other formats, composition of stored prompts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
