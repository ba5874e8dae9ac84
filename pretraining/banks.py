"""Phrase banks: plain text files of sections, and phrases that may name other sections as slots."""

import re
from pathlib import Path
from random import Random

PHRASES = Path(__file__).parent / "phrases"
SLOT = re.compile(r"\{([a-z_.]+)\}")


class Banks:
    """All sections of the files in `phrases/`, expandable as a small grammar.

    A file holds sections, `[name]` on a line of its own and then one phrase per line. A slot
    `{thing}` in a phrase stands for a phrase of the section `thing.<domain>` where there is one,
    and otherwise of the section `thing`.
    """

    def __init__(self, sections: dict[str, list[str]]) -> None:
        self.sections = sections
        self.domains = sorted(name.split(".")[1] for name in sections if name.startswith("thing."))

    @classmethod
    def load(cls, folder: Path = PHRASES) -> "Banks":
        """Read every `.txt` file of the folder, in the order of their names."""
        sections: dict[str, list[str]] = {}
        for path in sorted(folder.glob("*.txt")):
            phrases: list[str] = []
            for line in path.read_text(encoding="utf-8").splitlines():
                if line.startswith("["):
                    phrases = sections.setdefault(line.strip("[]"), [])
                elif line:
                    phrases.append(line)
        return cls(sections)

    def pairs(self, section: str) -> list[tuple[str, str]]:
        """Return a section of `left=right` lines as pairs."""
        return [tuple(line.split("=", 1)) for line in self.sections[section]]

    def expand(self, section: str, rng: Random, domain: str) -> str:
        """Draw a phrase of the section and fill its slots, all of them within one domain."""
        phrase = rng.choice(self.sections[section])
        return SLOT.sub(lambda slot: self._fill(slot[1], rng, domain), phrase)

    def _fill(self, slot: str, rng: Random, domain: str) -> str:
        narrow = f"{slot}.{domain}"
        return self.expand(narrow if narrow in self.sections else slot, rng, domain)
