"""Mix the pretraining corpus, train its tokenizer and pack it into one long row of token ids."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pretraining import sources, tasks
from pretraining.banks import Banks
from pretraining.handwritten import Letter, read_letters, retyped
from pretraining.messages import MessageWriter
from pretraining.tasks import ANSWER_END, ANSWER_START, Example, TaskWriter

EOS, PAD = "</s>", "<pad>"
CONTEXT = 512


@dataclass(frozen=True)
class Mixture:
    """Shares: of each kind of document, and of each source of the texts that tasks ask about."""

    kinds: dict[str, float]
    texts: dict[str, float]


# plenty of language first, mostly questions and answers later
EARLY = Mixture(
    kinds={
        "single": 48,
        "episode": 14,
        "profile": 14,
        "intent": 6,
        "plain": 6,
        "reply": 4,
        "word_feeling": 4,
        "wording": 2,
        "story": 1.5,
        "spelling": 0.5,
    },
    texts={"handwritten": 64, "composed": 28, "bank": 8},
)
LATE = Mixture(
    kinds={
        "fixed": 34,
        "single": 46,
        "profile": 6,
        "episode": 6,
        "intent": 2,
        "plain": 3,
        "word_feeling": 3,
    },
    texts={"handwritten": 78, "composed": 20, "bank": 2},
)


@dataclass
class Corpus:
    """Every text of the corpus, and the writers that make documents of them."""

    stories: list[str]
    queries: list[tuple[str, str]]
    words: list[str]
    letters: list[Letter]
    mixture: Mixture = EARLY
    banks: Banks = field(default_factory=Banks.load)

    def __post_init__(self) -> None:
        self.messages = MessageWriter(self.banks)
        self.tasks = TaskWriter(self.banks, self.words)
        self.intents = sorted({intent for _, intent in self.queries})
        self.topics = sorted({letter.topic for letter in self.letters})
        self.writers: dict[str, Callable[[Random], str]] = {
            "single": lambda rng: self.tasks.single(self.example(rng), rng),
            "fixed": self.fixed,
            "episode": self.episode,
            "profile": lambda rng: self.tasks.profile(self.example(rng), rng),
            "reply": lambda rng: self.tasks.reply(self.messages.write(rng), rng),
            "intent": self.intent,
            "plain": lambda rng: self.example(rng).text,
            "word_feeling": self.tasks.word_feeling,
            "wording": lambda rng: self.tasks.wording(self.example(rng), rng),
            "story": lambda rng: rng.choice(self.stories),
            "spelling": self.spelling,
        }

    @classmethod
    def read(cls, data: Path, stories: list[str]) -> "Corpus":
        """Read the public data sets in the folder and join them to the sampled stories."""
        return cls(
            stories=stories,
            queries=sources.banking_queries(data),
            words=sources.word_list(data),
            letters=[letter for letter in read_letters() if not letter.held_out],
        )

    def documents(self, seed: int) -> Iterator[str]:
        """Yield documents without end; the same seed gives the same ones."""
        rng = Random(seed)
        kinds, shares = list(self.mixture.kinds), list(self.mixture.kinds.values())
        while True:
            yield self.writers[rng.choices(kinds, shares)[0]](rng)

    def example(self, rng: Random) -> Example:
        """Draw a text with its known attributes."""
        shares = self.mixture.texts
        source = rng.choices(list(shares), list(shares.values()))[0]
        if source == "handwritten":
            letter = rng.choice(self.letters)
            return letter.example(retyped(letter.text, rng))
        if source == "composed":
            return tasks.message_example(self.messages.write(rng), self.banks.sections["shop"])
        text, intent = rng.choice(self.queries)
        values = {"failing": "yes" if sources.FAILING.search(intent) else "no"}
        values["question"] = "yes" if "?" in text else "no"
        return Example(text, tasks.surface_values(text) | values)

    def fixed(self, rng: Random) -> str:
        """A message and its mood in fixed words."""
        example = self.example(rng)
        while "mood" not in example.values:
            example = self.example(rng)
        return self.tasks.fixed(example, rng)

    def episode(self, rng: Random) -> str:
        """Two to seven texts that share one question."""
        return self.tasks.episode([self.example(rng) for _ in range(rng.randint(2, 7))], rng)

    def intent(self, rng: Random) -> str:
        """A text and its topic or intent, freely or chosen out of a few."""
        if rng.random() < 0.7:
            letter = rng.choice(self.letters)
            text, intent, others = retyped(letter.text, rng), letter.topic, self.topics
        else:
            (text, intent), others = rng.choice(self.queries), self.intents
        if rng.random() < 0.5:
            return f"{text}\n{rng.choice(['Topic', 'About', 'Category'])}: {tasks.answer(intent)}"
        options = [intent, *rng.sample(others, rng.randint(1, 3))]
        rng.shuffle(options)
        return f"Options: {', '.join(options)}.\n{text}\nAnswer: {tasks.answer(intent)}"

    def spelling(self, rng: Random) -> str:
        """A few words of the lexicon and their letters."""
        words = rng.sample(self.words, rng.randint(1, 4))
        return "\n".join(f"{word}: {' '.join(word)}" for word in words)


def train_tokenizer(documents: list[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that adds nothing in front or behind.

    There is no `<s>`: a prompt stands directly before the text, where instructions stood in training.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a document without its answer marks, and the spans that were marked."""
    plain, spans = "", []
    for part in text.split(ANSWER_START):
        marked, end, rest = part.partition(ANSWER_END)
        if end:
            spans.append((len(plain), len(plain) + len(marked)))
        plain += marked + rest
    return plain, spans


def pack(
    tokenizer: PreTrainedTokenizerFast,
    documents: Iterator[str],
    tokens: int,
    answer_weight: int,
    chunk: int = 4096,
) -> tuple[np.ndarray, np.ndarray]:
    """Return `tokens` ids, documents one after another, and the weight of each in the loss.

    Every document ends in `</s>`; after an answer, `</s>` belongs to it.
    """
    ids, weights = np.empty(tokens, dtype=np.uint16), np.ones(tokens, dtype=np.uint8)
    filled = 0
    while filled < tokens:
        texts, spans = zip(*(unmarked(next(documents)) for _ in range(chunk)), strict=True)
        rows = tokenizer(list(texts), return_offsets_mapping=True)
        for row, offsets, marks in zip(rows["input_ids"], rows["offset_mapping"], spans, strict=True):
            known = [any(a < end and b > start for start, end in marks) for a, b in offsets]
            document = [*row[: CONTEXT - 1], tokenizer.eos_token_id][: tokens - filled]
            known = [*known[: CONTEXT - 1], known[-1]][: tokens - filled]
            ids[filled : filled + len(document)] = document
            weights[filled : filled + len(document)][known] = answer_weight
            filled += len(document)
            if filled == tokens:
                break
    return ids, weights
