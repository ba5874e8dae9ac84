"""Large batches on Ray: folders of records in, answers of many prompts out, in order and resumable."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
