"""Text to batches: file formats, records, the verbalizer, tokens, length-aware batch planning."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
