import pytest
import torch

from softprompt.data import TokenRow
from softprompt.engine import TargetLogProbs
from softprompt.prompts import Prompt
from softprompt.training.collapse import LabelWatch
from softprompt.training.validation import Validation
from softprompt.world import world

LABELS = {"no": (5, 1), "yes": (6, 1)}
ROWS = [TokenRow((i,), LABELS["yes" if i % 2 else "no"], False, False) for i in range(6)]


class Preferring:
    """Gives a target's first token log p 0 when the prompt prefers it for that source, else -2."""

    name = "preferring"
    processes = world()

    def target_log_probs(self, rows):
        values, index = [], []
        for number, row in enumerate(rows):
            wanted = 6 if row.source[0] < row.prompt.input.item() else 5
            for place, token in enumerate(row.target):
                values.append(0.0 if place or token == wanted else -2.0)
                index.append(number)
        return TargetLogProbs(torch.tensor(values), torch.tensor(index))


def validation(**options):
    defaults = {"engine": Preferring(), "rows": ROWS, "labels": LABELS, "batch_size": 4}
    return Validation(**(defaults | options))


def test_accuracy_and_loss_of_labels():
    subject = validation()
    metrics = subject.metrics([Prompt(torch.tensor([[4.0]]))])  # yes for 0..3, no for 4 and 5
    assert metrics == {"accuracy": 0.5, "loss": 0.5}
    assert subject.quality(metrics) == [0.5, -0.5]


def test_loss_and_perplexity_of_free_text():
    subject = validation(labels=None)
    metrics = subject.metrics([Prompt(torch.tensor([[4.0]]))])
    assert metrics["loss"] == 0.5
    assert abs(metrics["perplexity"] - 2.718281828**0.5) < 1e-6
    assert subject.quality(metrics) == [-0.5]


def test_accuracy_decides_first_and_the_loss_between_equals():
    qualities = [
        validation().quality({"accuracy": accuracy, "loss": loss})
        for accuracy, loss in [(0.5, 0.1), (0.8, 0.9), (0.8, 0.4), (0.8, 0.4)]
    ]
    assert qualities[0] < qualities[1] < qualities[2] == qualities[3]


def test_collapse_and_a_plateau_at_chance_are_warned_of_once_and_kept(caplog):
    prompts, found, streaks = [Prompt(torch.tensor([[9.0]]))], {}, {}
    for epoch in range(6):
        subject = validation()  # as after a resume: what was seen is in the run's state alone
        subject.watch(found, streaks)
        subject.metrics(prompts)
        assert epoch or caplog.text == ""  # a first epoch may well answer everything alike
    assert caplog.text.count("6 of 6 validation records are answered 'yes', 2 epochs in a row") == 1
    assert caplog.text.count("is not above the commonest label's share 0.500 for 3 epochs") == 1
    assert list(found) == ["labels", "chance"]


@pytest.mark.parametrize(("others", "gold", "said"), [(1, 20, True), (2, 20, False), (0, 1, False)])
def test_nearly_one_answer_for_all_is_collapse_where_the_right_ones_are_not(caplog, others, gold, said):
    watch = LabelWatch()
    for _ in range(2):
        watch.look([1] * others + [0] * (30 - others), [1] * gold + [0] * (30 - gold), ["yes", "no"], 0.9)
    assert (f"{30 - others} of 30 validation records are answered 'yes'" in caplog.text) == said


def test_good_answers_are_not_warned_of(caplog):
    rows = [TokenRow((i,), LABELS["yes" if i < 3 else "no"], False, False) for i in range(6)]
    assert validation(rows=rows).metrics([Prompt(torch.tensor([[3.0]]))])["accuracy"] == 1
    assert caplog.text == ""


def test_the_stop_question_is_asked_between_parts():
    asked = []
    rows = ROWS * 50
    validation(rows=rows, check_stop=lambda: asked.append(1)).metrics([Prompt(torch.tensor([[4.0]]))])
    assert len(asked) == 2
