"""Rebuild the small language model that ships inside the package; see README.md here."""
