"""Distillation against its equations written out, over a model of one matrix."""

import torch

from softprompt.engine import EngineRow, TargetOutputs
from softprompt.prompts import Prompt, PromptTuningConfig, build_prompt
from softprompt.training.objectives import Distillation, TeacherPrompts

HEAD = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
TARGETS = [((1,), (2, 4)), ((3,), (0,)), ((2,), (1, 1))]
WHICH = [0, 1, 0]


def rows_of(prompts):
    """Rows of which the first and the last have one prompt."""
    values = [Prompt(prompt) for prompt in prompts]
    return [EngineRow(*each, values[i]) for each, i in zip(TARGETS, WHICH, strict=True)]


class OneMatrix:
    """Hidden states are the mean of the prompt plus the source and the place of the target."""

    name = "one matrix"

    def target_outputs(self, rows):
        hidden, labels, index = [], [], []
        for number, row in enumerate(rows):
            for place, token in enumerate(row.target):
                hidden.append(row.prompt.input.mean(dim=0) + 0.1 * row.source[0] + 0.01 * place)
                labels.append(token)
                index.append(number)
        states = torch.stack(hidden)
        return TargetOutputs(states @ HEAD.T, states, torch.tensor(labels), torch.tensor(index))


def teachers():
    table = torch.nn.Embedding(7, 3)
    config = PromptTuningConfig(num_virtual_tokens=2, token_dim=3, num_transformer_submodules=1)
    torch.manual_seed(1)
    return TeacherPrompts([build_prompt(config, table) for _ in range(3)])


def test_the_penalty_is_what_the_paper_says_and_differs_for_the_student_alone():
    both = teachers()
    student = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    scored = Distillation(OneMatrix(), both, 0.9)(rows_of(student), [0, 2, 0])
    penalty = torch.tensor(0.0)
    log_probs = []
    for (source, target), which in zip(TARGETS, WHICH, strict=True):
        wanted = both.materialize([0, 2][which]).detach()
        for place, token in enumerate(target):
            offset = 0.1 * source[0] + 0.01 * place
            h_student = student[which].mean(dim=0) + offset
            h_teacher = wanted.mean(dim=0) + offset
            p = torch.softmax(HEAD @ h_teacher, dim=0)
            q = torch.softmax(HEAD @ h_student, dim=0)
            penalty = penalty + (p * (p.log() - q.log())).sum()
            penalty = penalty + (h_student - h_teacher).square().mean()
            log_probs.append(q[token].log())
    torch.testing.assert_close(scored.values, torch.stack(log_probs))
    torch.testing.assert_close(scored.penalty, 0.9 * penalty)
    torch.testing.assert_close(scored.loss, 0.9 * penalty - torch.stack(log_probs).sum())
    scored.loss.backward()
    assert all(value.grad.abs().sum() > 0 for value in student)
    assert all(parameter.grad is None for parameter in both.parameters())


def test_a_student_that_is_its_teacher_has_no_penalty():
    both = teachers()
    scored = Distillation(OneMatrix(), both, 2.0)(rows_of([both.materialize(1), both.materialize(2)]), [1, 2, 1])
    torch.testing.assert_close(scored.penalty, torch.tensor(0.0), atol=1e-6, rtol=0)


def test_teachers_share_nothing_and_keep_their_values():
    one, other = teachers(), teachers()
    with torch.no_grad():
        one.materialize(1).zero_()
    assert not torch.equal(one.materialize(0), torch.zeros(2, 3))
    other.load_stored(one.stored())
    for task in range(3):
        assert torch.equal(one.materialize(task), other.materialize(task))
