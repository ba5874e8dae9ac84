"""The questions that the corpus asks about its texts: values, label words, fields and wordings.

The task that the package demonstrates (complaint or not) is held out: no attribute has that word
as a label. `labels` rows name one label per value, in the order of `values`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Attribute:
    """One thing to say about a text.

    values: the possible values, in a fixed order.
    labels: alternative rows of label words, one word per value.
    fields: names that a template may put in front of the answer.
    questions: ways to ask for it.
    meanings: one row of short descriptions per value, to define made-up labels with.
    share: how often tasks about it are drawn, relative to the others.
    """

    values: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    fields: tuple[str, ...]
    questions: tuple[str, ...]
    meanings: tuple[tuple[str, ...], ...]
    share: float


def binary(name: str, share: float, question: str, meaning: str, *, more: tuple = ()) -> Attribute:
    """An attribute that a text has or lacks, labelled `name` / `no name`, yes / no and the like."""
    return Attribute(
        values=("yes", "no"),
        labels=((name, f"no {name}"), (name, "other"), ("yes", "no"), ("true", "false"), *more),
        fields=(name.capitalize(), "Answer", "Has it"),
        questions=(question, f"{name} or no {name}?", f"Is there {name}?"),
        meanings=((meaning, name), ("the rest", f"no {name}", "anything else")),
        share=share,
    )


ATTRIBUTES: dict[str, Attribute] = {
    "polarity": Attribute(
        ("bad", "good"),
        (
            ("negative", "positive"), ("bad", "good"), ("angry", "happy"), ("sad", "glad"),
            ("unsatisfied", "satisfied"), ("terrible", "great"), ("thumbs down", "thumbs up"),
            ("unhappy", "happy"), ("hate", "love"), ("failure", "success"), ("worse", "better"),
        ),
        ("Sentiment", "Feeling", "Mood", "Opinion", "Tone", "Verdict", "Rating", "Customer"),
        ("Is this bad or good?", "How does the writer feel?", "What is the sentiment?",
         "Is the customer satisfied?", "Happy or angry?", "Was it a good experience?"),
        (("unhappy", "bad news", "something went wrong", "let down", "angry"),
         ("happy", "good news", "it went well", "pleased", "grateful")),
        12,
    ),
    "mood": Attribute(
        ("bad", "good", "plain"),
        (("negative", "positive", "neutral"), ("bad", "good", "neither"), ("angry", "happy", "calm"),
         ("unhappy", "happy", "neutral"), ("bad", "good", "plain"), ("minus", "plus", "zero"),
         ("low", "high", "middle")),
        ("Sentiment", "Mood", "Feeling", "Tone", "Stars", "Emotion"),
        ("What is the mood?", "Negative, positive or neutral?", "How does the writer feel?",
         "Which feeling does the text show?"),
        (("unhappy", "it failed", "cross", "bad"), ("happy", "it is fine", "glad", "good"),
         ("no feeling", "plain information", "a question or fact", "neutral")),
        12,
    ),
    "upset": Attribute(
        ("yes", "no"),
        (("upset", "calm"), ("yes", "no"), ("unhappy", "other"), ("angry", "not angry"),
         ("urgent", "normal"), ("warm up", "relax"), ("frown", "no frown"), ("anger", "no anger"),
         ("upset", "fine"), ("unhappy", "not unhappy"), ("trouble", "no trouble"), ("red", "green"),
         ("issue", "no issue"), ("grumble", "no grumble"), ("cross", "not cross"), ("bad", "rest"),
         ("let down", "not let down"), ("one", "zero"), ("alarm", "quiet"), ("true", "false"),
         ("annoyed", "not annoyed"), ("problem", "no problem"), ("1", "0"), ("sour", "other")),
        ("Upset", "State", "Mood", "Priority", "Face", "Alarm", "Unhappy", "Label"),
        ("Is the writer upset?", "Is somebody unhappy here?", "Does the writer feel let down?",
         "Should a manager read this?", "Is the customer unhappy?", "Did something go wrong?",
         "Upset or not?", "Is somebody annoyed with the service?"),
        (("unhappy", "upset", "annoyed", "something is wrong", "an unhappy customer", "let down"),
         ("all else", "fine, plain or happy", "calm", "nothing is wrong", "the rest", "not upset")),
        26,
    ),
    "delight": Attribute(
        ("yes", "no"),
        (("praise", "no praise"), ("fan", "other"), ("yes", "no"), ("delight", "no delight")),
        ("Praise", "Fan", "Quote it"),
        ("Does it praise somebody?", "Could we print this on our page?", "Is the writer delighted?"),
        (("praise", "delighted", "likes it"), ("all else", "no praise", "the rest")),
        4,
    ),
    "step": Attribute(
        ("trouble", "praise", "ask", "request", "fact", "solved"),
        (("apologise", "thank", "answer", "do it", "note", "close"),
         ("say sorry", "say thanks", "explain", "act", "file", "finish")),
        ("Next step", "Action", "To do", "Reaction"),
        ("What should we do next?", "What is the next step?", "How should the team react?"),
        (("it went wrong", "unhappy"), ("praise", "happy"), ("a question", "asks something"),
         ("a wish", "asks for action"), ("a fact", "information"), ("fixed now", "it works again")),
        5,
    ),
    "solved": Attribute(
        ("open", "solved"),
        (("open", "solved"), ("broken", "fixed"), ("pending", "done"), ("waiting", "sorted")),
        ("Status", "Ticket", "State"),
        ("Is it solved?", "Open or solved?", "Is it fixed?"),
        (("still wrong", "not fixed"), ("fixed", "it works again", "put right")),
        3,
    ),
    "failing": Attribute(
        ("yes", "no"),
        (("look into it", "explain"), ("repair", "teach"), ("broken", "how-to"), ("yes", "no")),
        ("Desk", "Queue", "Work", "Banking"),
        ("Did a thing fail?", "Look into it or explain?", "Does something not work?"),
        (("it failed", "does not work"), ("how to do it", "wants to know", "plain question")),
        5,
    ),
    "topic": Attribute(
        ("app", "care", "clothes", "device", "food", "home", "hotel", "money", "network", "parcel",
         "travel", "staff"),
        (("app", "health and care", "clothes", "electronics", "food", "furniture", "hotel", "money",
          "internet", "delivery", "travel", "staff"),
         ("software", "services", "fashion", "gadgets", "restaurant", "house", "stay", "bank",
          "phone", "post", "transport", "people")),
        ("Topic", "Department", "Category", "About", "Subject"),
        ("What is it about?", "Which department?", "What is the topic?"),
        (("apps",), ("care",), ("clothes",), ("machines",), ("eating",), ("the home",), ("a stay",),
         ("money",), ("internet",), ("parcels",), ("trips",), ("people who work there",)),
        5,
    ),
    "act": Attribute(
        ("report", "question", "request", "praise", "thanks", "announcement", "order", "smalltalk",
         "suggestion", "cancellation"),
        (("report", "question", "request", "praise", "thanks", "announcement", "order", "smalltalk",
          "suggestion", "cancellation"),
         ("tells", "asks", "wants", "likes", "thanks", "news", "buys", "chats", "proposes", "ends")),
        ("Act", "Purpose", "Kind", "Type", "Intent"),
        ("What does the writer do?", "What kind of message is it?", "What is it for?"),
        (("tells what happened",), ("asks something",), ("asks for action",), ("likes it",),
         ("says thanks",), ("gives news",), ("orders",), ("chats",), ("has an idea",), ("ends it",)),
        5,
    ),
    "answer": Attribute(
        ("yes", "no"),
        (("reply", "file"), ("yes", "no"), ("answer", "no answer"), ("needed", "not needed")),
        ("Reply needed", "Reply", "Answer needed", "Inbox"),
        ("Does it need a reply?", "Reply needed?", "Must somebody answer?"),
        (("needs a reply", "somebody must answer"), ("no reply needed", "just file it")),
        4,
    ),
    "return": Attribute(
        ("yes", "no"),
        (("yes", "no"), ("comes back", "stays away"), ("loyal", "lost"), ("again", "never again")),
        ("Would come back", "Loyal", "Again", "Next time"),
        ("Would this customer come back?", "Will they return?", "Would they buy again?"),
        (("would come back", "is satisfied"), ("would not come back", "is not satisfied")),
        4,
    ),
    "question": binary("question", 4, "Is it a question?", "asks something",
                       more=(("ask", "tell"), ("question", "statement"))),
    "thanks": binary("thanks", 2, "Does it say thanks?", "says thanks"),
    "money": binary("money", 2, "Does it mention money?", "names an amount"),
    "digits": binary("number", 2, "Is there a digit in it?", "has a digit"),
    "refund": binary("refund", 2, "Does it want money back?", "wants money back"),
    "please": binary("please", 1.5, "Does it say please?", "says please"),
    "loud": binary("shouting", 1.5, "Is it loud?", "capitals or many marks",
                   more=(("loud", "quiet"), ("noisy", "silent"))),
    "friend": binary("family", 1, "Is family mentioned?", "names a relative"),
    "shop": binary("shop", 1, "Is a shop named?", "names a shop"),
    "length": Attribute(
        ("short", "long"),
        (("short", "long"), ("brief", "lengthy"), ("small", "big")),
        ("Length", "Size"),
        ("Is it short or long?", "How long is the text?"),
        (("few words", "short"), ("many words", "long")),
        2,
    ),
}  # fmt: skip
