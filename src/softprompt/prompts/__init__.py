"""What is learned: configurations and initialisers. No model, no tokenizer and no weights file is touched here."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
