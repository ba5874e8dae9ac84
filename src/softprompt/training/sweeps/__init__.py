"""Sweeps: what is tried, successive halving, and the command's function."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
