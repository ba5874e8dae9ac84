"""What a bench does not print: warnings, and what transformers says below an error."""

from __future__ import annotations

import warnings

import transformers as tf


def quiet() -> None:
    """Say nothing of other libraries but errors, in this process."""
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
