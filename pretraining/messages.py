"""Compose short customer messages whose mood, purpose and topic are known.

The banks give the words; this module decides how a message is put together (an opener, one or two
statements, a closing remark) and how it is typed (contractions, slang, typing errors, capitals).
"""

import re
from dataclasses import dataclass
from random import Random

from pretraining.banks import Banks

# kind of message -> (mood, share of all messages)
KINDS = {
    "trouble": ("bad", 30),
    "sarcasm": ("bad", 7),
    "turn": ("bad", 3),
    "praise": ("good", 20),
    "solved": ("good", 9),
    "ask": ("plain", 13),
    "request": ("plain", 7),
    "fact": ("plain", 9),
    "chat": ("plain", 4),
    "news": ("plain", 3),
}
GENERAL = "generic"
# kind -> section of whole messages of no certain topic, which stand for it in half of the draws
SCENES = {
    "trouble": "scene.bad",
    "praise": "scene.good",
    "solved": "scene.solved",
    "ask": "scene.plain",
    "request": "scene.plain",
    "fact": "scene.plain",
}
SCENE_SHARE = {
    "trouble": 0.6,
    "praise": 0.6,
    "solved": 0.4,
    "ask": 0.5,
    "request": 0.5,
    "fact": 0.5,
}


@dataclass(frozen=True)
class Message:
    """A short text and what is known about it: the kind, the mood and the topic, where it has one."""

    text: str
    kind: str
    mood: str
    domain: str | None


class MessageWriter:
    """Writes messages from the banks; the same random state gives the same message."""

    def __init__(self, banks: Banks) -> None:
        self.banks = banks
        self.domains = [*banks.domains, "staff"]
        self.contractions = banks.pairs("contraction")
        self.slang = banks.pairs("short_for")

    def write(self, rng: Random, kind: str | None = None) -> Message:
        """Write one message of the kind, or of a kind drawn by its share."""
        if kind is None:
            kind = rng.choices(list(KINDS), [share for _, share in KINDS.values()])[0]
        if rng.random() < SCENE_SHARE.get(kind, 0):
            return self._scene(kind, rng)
        domain = rng.choice(self.domains)
        if kind in ("chat", "news") or (kind != "trouble" and domain == "staff"):
            domain = rng.choice(self.banks.domains)
        text = self._typed(self._sentences(kind, domain, rng), rng)
        return Message(text, kind, KINDS[kind][0], domain)

    def _scene(self, kind: str, rng: Random) -> Message:
        """Write a message around one whole scene, rarely around two."""
        section, domain = SCENES[kind], rng.choice(self.banks.domains)
        body = [self.banks.expand(section, rng, domain) for _ in range(1 + (rng.random() < 0.12))]
        if section == "scene.plain":
            kind = "ask" if body[-1].endswith("?") else "note"
        mood = KINDS.get(kind, ("plain", 0))[0]
        self._frame(body, {"plain": "neutral"}.get(mood, mood), 0.2, domain, rng)
        return Message(self._typed(body, rng), kind, mood, None)

    def _frame(self, body: list[str], style: str, share: float, domain: str, rng: Random) -> None:
        """Put an opener in front and a closing remark behind, each with the given chance."""
        if rng.random() < share:
            tone = "neutral" if rng.random() < 0.4 else style
            body[0] = f"{self.banks.expand(f'opener.{tone}', rng, domain)} {body[0]}"
        if rng.random() < share:
            tone = "neutral" if rng.random() < 0.25 else style
            body.append(self.banks.expand(f"extra.{tone}", rng, domain))

    def _sentences(self, kind: str, domain: str, rng: Random) -> list[str]:
        """Return the clauses of a message, still in lower case and without full stops."""
        if kind == "turn":
            good = self._statement("praise", domain, rng)
            return [f"{good} {rng.choice(['but', 'however', 'but then', 'yet'])}"
                    f" {self._statement('trouble', domain, rng)}"]  # fmt: skip
        style = {"trouble": "bad", "sarcasm": "bad", "praise": "good", "solved": "good"}
        style = style.get(kind, "neutral")
        body = [self._statement(kind, domain, rng)]
        if rng.random() < 0.3:
            body.append(self._statement(kind, domain, rng))
        elif kind == "ask" and rng.random() < 0.3:
            body.insert(0, self._statement("fact", domain, rng))
        elif kind == "solved" and rng.random() < 0.3:
            body.append(self._statement("praise", domain, rng))
        if kind != "chat":
            self._frame(body, style, 0.3, domain, rng)
        return body

    def _statement(self, kind: str, domain: str, rng: Random) -> str:
        """Draw a clause: mostly of the domain, else one that fits everywhere."""
        sections = self.banks.sections
        names = [f"{kind}.{domain}", f"{kind}.any", f"{kind}.{GENERAL}"]
        shares = [1, 0, 0] if (kind, domain) == ("trouble", "staff") else [6, 3, 2]
        known = [(name, share) for name, share in zip(names, shares, strict=True) if name in sections]
        if not known:
            return self.banks.expand(kind, rng, domain)
        section = rng.choices([name for name, _ in known], [share for _, share in known])[0]
        return self.banks.expand(section, rng, domain)

    def _typed(self, sentences: list[str], rng: Random) -> str:
        """Join sentences the way people type: more or less careful."""
        careless = rng.random() < 0.35
        parts = []
        for sentence in sentences:
            if not careless or rng.random() < 0.2:
                sentence = sentence[0].upper() + sentence[1:]  # noqa: PLW2901
            end = rng.choices([".", "!", "", "...", "!!"], [60, 14, 16, 5, 5])[0]
            if careless:
                end = rng.choices([".", "", "!", ",", "!!!"], [30, 40, 10, 12, 8])[0]
            ends_itself = sentence[-1] in ".?!"
            parts.append(sentence if ends_itself else sentence + end)
        text = " ".join(parts).rstrip(",")
        if rng.random() < 0.5:
            text = substitute(text, self.contractions, rng, 0.8)
        if careless and rng.random() < 0.35:
            text = substitute(text, self.slang, rng, 0.7)
        if careless and rng.random() < 0.6:
            text = text.lower() if rng.random() < 0.85 else text.replace(".", "").replace("'", "")
        if rng.random() < 0.04:
            text = text.upper()
        if rng.random() < 0.14:
            text = mistype(text, rng)
        return text


def substitute(text: str, pairs: list[tuple[str, str]], rng: Random, share: float) -> str:
    """Replace whole words or phrases by their pair, each pair with the given chance."""
    for old, new in pairs:
        if old in text and rng.random() < share:
            text = re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", new, text)
    return text


def mistype(text: str, rng: Random) -> str:
    """Make one or two typing errors: a swapped, doubled or dropped letter."""
    for _ in range(rng.randint(1, 2)):
        spots = [i for i in range(1, len(text) - 1) if text[i : i + 2].isalpha()]
        if not spots:
            return text
        i = rng.choice(spots)
        middle = rng.choice([text[i + 1] + text[i], text[i] + text[i : i + 2], text[i + 1]])
        text = text[:i] + middle + text[i + 2 :]
    return text
