"""The frozen model seen through a few facts. Knowledge of an architecture lives here and in ``engine``."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
