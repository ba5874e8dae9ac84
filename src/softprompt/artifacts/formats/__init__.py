"""Every layout that a prompt can be read from or written to, as one table."""

from __future__ import annotations

from softprompt.artifacts.formats.format import Export, Format, Read
from softprompt.artifacts.formats.table import FORMATS, detect, format_named

__all__ = ["FORMATS", "Export", "Format", "Read", "detect", "format_named"]
