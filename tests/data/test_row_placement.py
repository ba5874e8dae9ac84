"""Where a prompt stands in tokenised rows, and chat templates as frames around the text."""

from __future__ import annotations

import pytest

from oracles.tokenizers import byte_level
from softprompt.data.chat_frame import ChatFrame
from softprompt.data.template import Verbalizer
from softprompt.data.tokens import RowTokenizer
from softprompt.errors import ConfigError
from softprompt.prompts.kinds import Placement
