"""The demonstration's messages are not in the text the bundled model was pretrained on."""

from __future__ import annotations

import json
import re
from pathlib import Path

from softprompt.bundled import complaints

MESSAGES = Path(__file__).parents[2] / "pretraining" / "messages"


def runs(text):
    words = re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)} or {tuple(words)}


def test_no_pretraining_message_shares_five_words_in_a_row():
    demo = set()
    for split in ("train", "validation", "test"):
        for line in complaints(split).read_text(encoding="utf-8").splitlines():
            demo |= runs(json.loads(line)["input"])
    files = sorted(MESSAGES.glob("*.tsv"))
    assert len(files) > 50
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert not runs(line.split("\t")[3]) & demo, f"{path.name}:{number}"
