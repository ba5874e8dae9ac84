"""Read the public data sets of the corpus; their licences allow use in weights that are shipped.

Banking77 (CC BY 4.0) and the word list of the g2p lexicon (Apache-2.0). Nothing else is read from
the data folder.
"""

import csv
import json
import re
from pathlib import Path

# Banking77 intents in which something did not work, apart from those that ask how to do a thing
FAILING = re.compile(
    r"not_|failed|declined|wrong|swallowed|reverted|pending|charged|lost|blocked|unable|extra_charge"
    r"|compromised|forgotten"
)


def banking_queries(data: Path, split: str = "train") -> list[tuple[str, str]]:
    """Return (query, intent in words) of a split of Banking77."""
    with open(data / "banking77" / f"{split}.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [(" ".join(row["text"].split()), row["category"].lower().replace("_", " ").strip("?")) for row in rows]


def word_list(data: Path) -> list[str]:
    """Return the lower-case words of three to nine letters in the g2p lexicon, sorted.

    They serve as made-up labels, so the label word of the held-out task is left out.
    """
    text = (data / "g2p_lexicon" / "us_gold.json").read_text(encoding="utf-8")
    return sorted(word for word in json.loads(text) if re.fullmatch(r"(?!complain)[a-z]{3,9}", word))
