"""Many requests at once: the only decoder and the only label scorer, each row with its own prompt."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
