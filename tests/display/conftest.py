"""Figures, to the pixel."""

import pytest

from softprompt.display import figures


@pytest.fixture(autouse=True)
def rendered(monkeypatch):
    """Render what other tests only draw."""
    monkeypatch.setattr(figures, "png_of", figures.png_of.__wrapped__)
