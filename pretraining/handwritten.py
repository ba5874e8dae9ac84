"""Read the handwritten customer messages and turn them into examples with known attributes.

`messages/*.tsv` holds one message per row: mood, act, topic and the message itself. They carry most
of the variety of the corpus. About one in twenty, chosen by a hash of its text, stays out of the
corpus and serves to measure.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from random import Random

from pretraining.attributes import ATTRIBUTES
from pretraining.messages import mistype
from pretraining.tasks import Example, surface_values

FOLDER = Path(__file__).parent / "messages"
HELD_OUT_ONE_IN = 20
# mood of a row -> value of the attribute "mood"
MOODS = {"unhappy": "bad", "happy": "good", "relieved": "good", "neutral": "plain"}
ACTS = ATTRIBUTES["act"].values
EXPECTS_REPLY = {"question", "request", "order", "cancellation"}


@dataclass(frozen=True)
class Letter:
    """A handwritten message and what its writer noted about it."""

    mood: str
    act: str
    topic: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the message stays out of the corpus."""
        return hashlib.sha256(self.text.encode()).digest()[0] * HELD_OUT_ONE_IN < 256

    def example(self, text: str) -> Example:
        """Return the example of this message, typed as `text`."""
        mood = MOODS[self.mood]
        values = surface_values(text) | {"mood": mood, "act": self.act}
        values["upset"] = "yes" if mood == "bad" else "no"
        values["delight"] = "yes" if self.mood == "happy" else "no"
        values["question"] = "yes" if "?" in text else "no"
        expected = mood == "bad" or self.act in EXPECTS_REPLY
        values["answer"] = "yes" if expected else "no"
        if mood != "plain":
            values |= {"polarity": mood, "return": "no" if mood == "bad" else "yes"}
        if self.mood in ("unhappy", "relieved"):
            values["solved"] = "open" if mood == "bad" else "solved"
        return Example(text, values)


def read_letters(folder: Path = FOLDER) -> list[Letter]:
    """Read every `.tsv` file of the folder, in the order of their names, and check its rows."""
    letters = []
    for path in sorted(folder.glob("*.tsv")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            cells = [cell.strip() for cell in line.split("\t")]
            known = len(cells) == 4 and cells[0] in MOODS and cells[1] in ACTS and all(cells[2:])
            if not known:
                raise ValueError(f"{path.name}:{number} is not mood, act, topic, message: {line!r}")
            letters.append(Letter(*cells))
    return letters


def retyped(text: str, rng: Random) -> str:
    """Type a message anew: as it is, or with less care, or with a few words lost."""
    care = rng.random()
    if care < 0.45:
        return text
    if rng.random() < 0.35:
        text = text.lower()
    if rng.random() < 0.25:
        text = text.rstrip(".!") if rng.random() < 0.6 else text.replace(",", "").replace(".", "")
    if rng.random() < 0.2:
        text = text.replace("'", "")
    if rng.random() < 0.25:
        text = mistype(text, rng)
    if rng.random() < 0.4:
        words = [word for word in text.split() if rng.random() > 0.1]
        text = " ".join(words) or text
    return text.strip() or "?"
