"""Turn texts with known attributes into text -> answer documents.

What the model has to learn here is less the answers than the way they are asked for: a few words in
front (an instruction, a definition of labels, worked examples) decide which of many questions about
the same text is answered, and in which words. That is the place a tuned prompt takes later.
"""

import re
from dataclasses import dataclass
from random import Random

from pretraining.attributes import ATTRIBUTES, Attribute
from pretraining.banks import Banks
from pretraining.messages import Message

LAYOUTS = (
    "Text: {text}\n{field}: {label}", "{text}\n{field}: {label}", "{text}\n{field}: {label}",
    "Message: {text}\nLabel: {label}", "Message: {text}\nLabel: {label}",
    "Message: {text}\nLabel: {label}", "Message: {text}\nLabel: {label}",
    "Message: {text}\n{field}: {label}", "Text: {text}\nLabel: {label}",
    "Input: {text}\nOutput: {label}", "Input: {text}\n{field}: {label}", '"{text}" -> {label}',
    "{text} => {label}", "Message: {text}\n{field}: {label}", "Message: {text} {field}: {label}",
    "Q: {question} {text}\nA: {label}", "{text}\n{question} {label}", "{text} {question} {label}",
    "Tweet: {text}\n{field}: {label}", "Customer: {text}\n{field}: {label}",
    "Review: {text}\n{field}: {label}", "Sentence: {text} {field}: {label}",
    "### Input:\n{text}\n### {field}:\n{label}", "{text} [{label}]", "{text} | {label}",
    '{field} of "{text}": {label}', "{text}\n{label}", "Text : {text} {field} : {label}",
    "{question}\n\n{text}\n\nAnswer: {label}", "<{text}> {field} = {label}", "{text} {field}: {label}",
)  # fmt: skip
PLAIN_FIELDS = ("Label", "Label", "Class", "Answer", "Output", "Category", "Tag", "Type", "Result")
ORDERS = (
    "{question} Choose from: {options}.", "Options: {options}.", "Say {options}.",
    "Label the text as {options}.", "Classify: {options}.", "{question} ({options})",
    "Decide between {options}.", "Answer with {options}.", "{question}", "{field}? {options}",
    "Task: {question}", "Sort into {options}.",
)  # fmt: skip
# fields that always take the same words: bad, good, plain
FIXED = {
    "Mood": ("unhappy", "happy", "neutral"),
    "Sentiment": ("negative", "positive", "neutral"),
    "Upset": ("yes", "no", "no"),
}
DEFINITIONS = (
    "{label} = {meaning}", "{label} means {meaning}", "{meaning}: {label}", "{label}: {meaning}",
    "if {meaning}, write {label}", "{meaning} -> {label}", "say {label} for {meaning}",
)  # fmt: skip
# what stands between these is an answer that can be known: it weighs more in the loss
ANSWER_START, ANSWER_END = "\x02", "\x03"
THANKS = re.compile(r"\b(thanks?|thx|cheers|ty)\b", re.IGNORECASE)
REFUND = re.compile(r"refund|money back|reverse the payment", re.IGNORECASE)
MONEY = re.compile(r"[$£€]\s?\d|\b(euros|pounds|quid|bucks)\b", re.IGNORECASE)
FAMILY = re.compile(r"\bmy (wife|husband|son|daughter|mum|sister|dad|partner)|\bgrandma", re.I)


def answer(text: str) -> str:
    """Mark a text as an answer."""
    return f"{ANSWER_START}{text}{ANSWER_END}"


@dataclass(frozen=True)
class Example:
    """A text and the value of each attribute that is known for it."""

    text: str
    values: dict[str, str]


def surface_values(text: str) -> dict[str, str]:
    """Return the attributes that can be read off the characters of any text."""
    words = len(text.split())
    values = {
        "thanks": THANKS.search(text),
        "refund": REFUND.search(text),
        "money": MONEY.search(text),
        "digits": re.search(r"\d", text),
        "please": re.search(r"\b(please|pls)\b", text, re.IGNORECASE),
        "loud": text.isupper() or "!!" in text,
        "friend": FAMILY.search(text),
    }
    known = {name: "yes" if found else "no" for name, found in values.items()}
    if words <= 7 or words >= 16:
        known["length"] = "short" if words <= 7 else "long"
    return known


def message_example(message: Message, shops: list[str]) -> Example:
    """Return the example of a composed message."""
    kind, text = message.kind, message.text
    values = surface_values(text) | {"mood": message.mood}
    values["upset"] = "yes" if message.mood == "bad" else "no"
    values["delight"] = "yes" if kind == "praise" else "no"
    values["question"] = "yes" if "?" in text else "no"
    values["shop"] = "yes" if any(shop.lower() in text.lower() for shop in shops) else "no"
    if message.mood != "plain":
        values["polarity"] = message.mood
        values["solved"] = "solved" if kind == "solved" else "open"
        if kind == "praise":
            del values["solved"]
    step = "trouble" if message.mood == "bad" else kind
    if step in ATTRIBUTES["step"].values:
        values["step"] = step
    if message.domain and kind not in ("chat", "news"):
        values["topic"] = message.domain
    return Example(text, values)


class TaskWriter:
    """Writes task documents about examples, a new wording for each."""

    def __init__(self, banks: Banks, words: list[str]) -> None:
        self.banks = banks
        self.words = words  # stock of words that can be made-up labels

    def pick(self, examples: list[Example], rng: Random) -> str:
        """Draw an attribute that all the examples have, by its share."""
        common = [name for name in ATTRIBUTES if all(name in e.values for e in examples)]
        return rng.choices(common, [ATTRIBUTES[name].share for name in common])[0]

    def verbalise(self, attribute: Attribute, made_up_share: float, rng: Random) -> tuple[dict[str, str], bool]:
        """Choose label words for the values; the flag says that they are made up."""
        made_up = len(attribute.values) <= 3 and rng.random() < made_up_share
        if made_up:
            stock = self.words if rng.random() < 0.5 else self.banks.sections["label"]
            words = rng.sample(stock, len(attribute.values))
            if len(words) == 2 and rng.random() < 0.25:
                words[1] = f"{rng.choice(['no', 'not', 'non'])} {words[0]}"
                if rng.random() < 0.5:
                    words.reverse()
        else:
            words = list(rng.choice(attribute.labels))
        if rng.random() < 0.2:
            words = [word.capitalize() for word in words]
        return dict(zip(attribute.values, words, strict=True)), made_up

    def order(self, attribute: Attribute, labels: dict[str, str], define: bool, rng: Random) -> str:
        """Write the words in front: an instruction, or what each label stands for."""
        if define:
            form = rng.choice(DEFINITIONS)
            meanings = dict(zip(attribute.values, attribute.meanings, strict=True))
            parts = [
                form.format(label=labels[value], meaning=rng.choice(meanings[value]))
                for value in rng.sample(list(labels), len(labels))
            ]
            return rng.choice([", ", "; ", "\n", ". "]).join(parts)
        options = rng.sample(list(labels.values()), len(labels))
        if len(options) > 6:
            options = options[:6]
        joint = rng.choice([" or ", ", ", " / "])
        text = joint.join(options) if joint != " or " else ", ".join(options[:-1])
        if joint == " or ":
            text = f"{text} or {options[-1]}" if text else options[-1]
        return rng.choice(ORDERS).format(
            options=text,
            question=rng.choice(attribute.questions),
            field=rng.choice(attribute.fields),
        )

    def layout(self, attribute: Attribute, rng: Random) -> str:
        """Choose a layout with its field and question filled in; text and label stay open."""
        field = rng.choice(attribute.fields if rng.random() < 0.5 else PLAIN_FIELDS)
        if rng.random() < 0.1:
            field = field.lower()
        question = rng.choice(attribute.questions)
        form = rng.choice(LAYOUTS)
        return form.replace("{field}", field).replace("{question}", question)

    def single(self, example: Example, rng: Random) -> str:
        """One text and its answer, most often with an order in front."""
        name = self.pick([example], rng)
        attribute = ATTRIBUTES[name]
        labels, made_up = self.verbalise(attribute, 0.35, rng)
        form = self.layout(attribute, rng)
        label = labels[example.values[name]]
        if not made_up and rng.random() < 0.2:
            return form.replace("{label}", label).replace("{text}", example.text)
        order = self.order(attribute, labels, made_up or rng.random() < 0.2, rng)
        asked = form.replace("{label}", answer(label)).replace("{text}", example.text)
        return order + rng.choice(["\n", "\n\n", " ", "\n"]) + asked

    def fixed(self, example: Example, rng: Random) -> str:
        """One text and its mood in fixed words, the plainest way to learn what matters most."""
        lead = rng.choices(["Message: ", "", "Text: "], [6, 3, 1])[0]
        place = ("bad", "good", "plain").index(example.values["mood"])
        fields = rng.sample(list(FIXED), 1 + (rng.random() < 0.3))
        lines = [f"{field}: {answer(FIXED[field][place])}" for field in fields]
        return "\n".join([lead + example.text, *lines])

    def episode(self, examples: list[Example], rng: Random) -> str:
        """Several texts under one layout and one set of label words."""
        name = self.pick(examples, rng)
        attribute = ATTRIBUTES[name]
        labels, made_up = self.verbalise(attribute, 0.6, rng)
        form = self.layout(attribute, rng)
        ordered = rng.random() < 0.35
        shots = []
        for i, example in enumerate(examples):
            label = labels[example.values[name]]
            known = answer(label) if ordered or i > 1 else label
            shots.append(form.replace("{label}", known).replace("{text}", example.text))
        if ordered:
            shots.insert(0, self.order(attribute, labels, made_up, rng))
        return rng.choice(["\n", "\n\n", "\n---\n"]).join(shots)

    def profile(self, example: Example, rng: Random) -> str:
        """One text and the answers to several questions about it."""
        names = [n for n in example.values if rng.random() < min(0.9, ATTRIBUTES[n].share / 9)]
        rng.shuffle(names)
        lines = []
        for name in names[:5] or ["question"]:
            attribute = ATTRIBUTES[name]
            labels = dict(zip(attribute.values, rng.choice(attribute.labels), strict=True))
            lead = rng.choice([f"{rng.choice(attribute.fields)}:", rng.choice(attribute.questions)])
            lines.append(f"{lead} {answer(labels[example.values[name]])}")
        return "\n".join([example.text, *lines])

    def wording(self, example: Example, rng: Random) -> str:
        """A question about the words themselves: the first, the last, or whether one is there."""
        words = re.findall(r"[\w']+", example.text) or ["none"]
        kind = rng.choice(["first", "last", "contains", "copy"])
        if kind == "copy":
            return f"Repeat: {example.text[:80]}\nCopy: {example.text[:80]}"
        if kind == "contains":
            present = rng.random() < 0.5
            word = rng.choice(words if present else self.words)
            found = "yes" if word in words else "no"
            return f"{example.text}\nDoes it contain {word}? {answer(found)}"
        word = words[0] if kind == "first" else words[-1]
        form = rng.choice(["{t}\n{K} word: {w}", "{K} word of the text? {t} -> {w}", "{K} word\n{t}\n{w}"])
        return form.format(t=example.text, K=kind.capitalize(), w=word)

    def reply(self, message: Message, rng: Random) -> str:
        """A message and the answer of a customer service."""
        tone = {"bad": "bad", "good": "good", "plain": "neutral"}[message.mood]
        if message.kind in ("ask", "solved"):
            tone = message.kind
        reply = self.banks.expand(f"reply.{tone}", rng, message.domain or self.banks.domains[0])
        names = rng.choice([("Customer", "Agent"), ("Message", "Reply"), ("Q", "A"), ("User", "Team")])
        reason = ""
        if message.kind != "solved" and rng.random() < 0.4:
            cause = "neutral" if message.mood == "plain" else message.mood
            phrase = self.banks.expand(f"cause.{cause}", rng, message.domain or self.banks.domains[0])
            reason = f"\n{rng.choice(['Why', 'Reason', 'Note'])}: {phrase}"
        return f"{names[0]}: {message.text}\n{names[1]}: {reply[0].upper()}{reply[1:]}{reason}"

    def word_feeling(self, rng: Random) -> str:
        """A few words and whether they are bad, good or plain ones."""
        kinds = rng.choice([("bad", "good"), ("bad", "good", "plain")])
        rows = [ATTRIBUTES["mood"].labels, ATTRIBUTES["polarity"].labels][len(kinds) == 2]
        labels = dict(zip(kinds, rng.choice(rows), strict=True))
        form = rng.choice(["{w} -> {l}", "Word: {w}\nFeeling: {l}", "{w}: {l}", "{w} is {l}"])
        drawn = [rng.choice(kinds) for _ in range(rng.randint(2, 5))]
        return "\n".join(
            form.format(w=rng.choice(self.banks.sections[f"word.{kind}"]), l=answer(labels[kind])) for kind in drawn
        )
