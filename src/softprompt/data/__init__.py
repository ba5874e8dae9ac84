"""Text to rows to batches: files, records, the verbalizer, tokens, length-aware planning."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
