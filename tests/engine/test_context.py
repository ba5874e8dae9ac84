"""What does not fit is refused with the numbers."""

from __future__ import annotations

import pytest

from softprompt.engine import check_context
from softprompt.errors import ContextOverflowError


def test_the_message_names_every_number():
    with pytest.raises(ContextOverflowError) as caught:
        check_context(1010, 20, 1024)
    message = str(caught.value)
    assert message.startswith("1,010 + 20 virtual tokens exceed the model's 1,024")
    assert "shorten the input" in message
    assert "\n" not in message


def test_new_tokens_count():
    with pytest.raises(ContextOverflowError) as caught:
        check_context(1000, 20, 1024, new=5)
    message = str(caught.value)
    assert message.startswith("1,000 + 20 virtual tokens + 5 new tokens exceed the model's 1,024")
    assert "max_new_tokens" in message


def test_whose_limit_it_is():
    with pytest.raises(ContextOverflowError, match="exceed the decoder's 8"):
        check_context(9, 0, 8, what="decoder")


@pytest.mark.parametrize(
    ("tokens", "virtual", "new", "limit"),
    [(1004, 20, 0, 1024), (1000, 20, 4, 1024), (10**6, 10**6, 0, None), (0, 0, 0, 0)],
)
def test_what_fits_passes(tokens, virtual, new, limit):
    check_context(tokens, virtual, limit, new=new)


@pytest.mark.parametrize(("tokens", "virtual", "new"), [(1005, 20, 0), (1000, 20, 5), (1025, 0, 0)])
def test_one_too_many_does_not(tokens, virtual, new):
    with pytest.raises(ContextOverflowError):
        check_context(tokens, virtual, 1024, new=new)
