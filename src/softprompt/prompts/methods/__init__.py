"""The methods, one file each: configuration, module, initialiser and, where a method has its own, the loss."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
