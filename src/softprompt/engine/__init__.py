"""How prompts meet the model: virtual ids, where they stand in a batch, and the passes that run them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
