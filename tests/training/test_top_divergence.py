"""The divergence from a teacher's top k: against the whole vocabulary, a slow loop, and autograd."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import kl_div

from oracles import families
from softprompt.backbone import Base
from softprompt.engine import EngineRow, ForestEngine
from softprompt.prompts import Prompt
from softprompt.training import LabelChoice, TopDivergence, TopTargets
from softprompt.training.objectives import BatchLoss

M, V = 7, 33


def logits(seed, scale=3.0):
    return torch.randn(M, V, generator=torch.Generator().manual_seed(seed)) * scale


def slow(teacher, student, k):
    """KL over the teacher's k likeliest tokens and one class for all others, token by token in float64."""
    found = []
    for one, other in zip(teacher.double().softmax(1).tolist(), student.double().softmax(1).tolist(), strict=True):
        top = sorted(range(V), key=lambda i: -one[i])[:k]
        rest = [i for i in range(V) if i not in top]
        classes = [(one[i], other[i]) for i in top]
        classes += [(sum(one[i] for i in rest), sum(other[i] for i in rest))] if rest else []
        found.append(sum(p * (math.log(p) - math.log(q)) for p, q in classes))
    return torch.tensor(found, dtype=torch.float64)


def test_with_the_whole_vocabulary_it_is_the_full_divergence_and_so_is_its_gradient():
    teacher = logits(0)
    ours, theirs = logits(1).requires_grad_(), logits(1).requires_grad_()
    found = TopTargets.of(teacher, V).divergence(ours)
    wanted = kl_div(theirs.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(found, wanted)
    (mine,) = torch.autograd.grad(found.sum(), ours)
    (full,) = torch.autograd.grad(wanted.sum(), theirs)
    torch.testing.assert_close(mine, full, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 5, V - 1])
def test_it_is_a_slow_loop_over_tokens_and_its_gradient_that_of_differences(k):
    teacher, student = logits(0), logits(1).requires_grad_()
    found = TopTargets.of(teacher, k).divergence(student)
    torch.testing.assert_close(found.double(), slow(teacher, student.detach(), k), atol=1e-5, rtol=1e-5)
    (grad,) = torch.autograd.grad(found.sum(), student)
    step, nudged = 1e-4, student.detach().double()
    for row, column in [(0, 0), (3, int(teacher[3].argmax())), (6, 32)]:
        moved = [nudged.clone(), nudged.clone()]
        moved[0][row, column] += step
        moved[1][row, column] -= step
        slope = (slow(teacher, moved[0], k).sum() - slow(teacher, moved[1], k).sum()) / (2 * step)
        assert grad[row, column].item() == pytest.approx(slope.item(), abs=1e-4)


def test_fewer_classes_never_tell_more_apart():
    teacher, student = logits(0), logits(1)
    values = [TopTargets.of(teacher, k).divergence(student).sum().item() for k in (1, 5, 20, V)]
    assert values == sorted(values)
    assert values[0] > 0


def test_a_tail_without_any_mass_is_finite_and_has_a_gradient():
    sure = torch.full((1, V), -1e4)
    sure[0, :3] = 0.0
    student = torch.zeros(1, V).requires_grad_()
    value = TopTargets.of(sure, 3).divergence(student)
    value.sum().backward()
    assert value.item() == pytest.approx(math.log(V / 3), abs=1e-5)
    assert torch.isfinite(student.grad).all()


def test_a_row_finds_its_teacher_by_its_tokens_and_labels_are_mixed_in():
    model = families.tiny("llama")
    engine = ForestEngine(Base(model, None, "tiny"), trusted=True)
    prompt = Prompt(torch.randn(2, model.config.hidden_size))
    rows = [EngineRow((5, 6), (7, 8, 9), prompt), EngineRow((5, 7), (8, 9), prompt)]
    outputs = engine.target_outputs(rows)
    taught = {(row.source, row.target): TopTargets.of(torch.randn(len(row.target), 64), 4) for row in rows}
    objective = TopDivergence(engine, taught, {(rows[1].source, rows[1].target): 0.25})
    parts = [taught[row.source, row.target] for row in rows]
    kl = TopTargets.joined(parts).divergence(outputs.logits)
    log_p = outputs.logits.log_softmax(1).gather(1, outputs.labels[:, None])[:, 0]
    wanted = kl[:3].sum() + 0.75 * kl[3:].sum() - 0.25 * log_p[3:].sum()
    torch.testing.assert_close(objective(rows, [0, 0]).loss, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(objective(rows[::-1], [0, 0]).loss, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("given", [0.0, 0.25])
def test_a_choice_among_labels_adds_its_divergence_from_the_teachers(given):
    model = families.tiny("llama")
    engine = ForestEngine(Base(model, None, "tiny"), trusted=True)
    prompt, labels = Prompt(torch.randn(2, model.config.hidden_size)), ((7, 8), (9,), (10, 11, 12))
    rows = [EngineRow((5, 6), labels[2], prompt), EngineRow((5, 7), labels[0], prompt)]
    taught = {(row.source, row.target): TopTargets.of(torch.randn(len(row.target), 64), 4) for row in rows}
    scores = {key: [-1.0 * n, -2.0, -0.5] for n, key in enumerate(taught, start=1)}
    weights = {(rows[1].source, rows[1].target): given}
    with_choice = TopDivergence(engine, taught, weights, (), LabelChoice(engine, labels, 2.0), scores)
    wanted = TopDivergence(engine, taught, weights)(rows, [0, 0]).loss
    for row, part in zip(rows, (0.0, given), strict=True):
        sums = [engine.target_log_probs([replace(row, target=ids)]).values.sum() for ids in labels]
        teacher = (1 - part) * torch.tensor(scores[row.source, row.target]).softmax(0)
        teacher[labels.index(row.target)] += part
        wanted = wanted + 2.0 * (teacher * (teacher.log() - torch.stack(sums).log_softmax(0))).sum()
    found = with_choice(rows, [0, 0])
    torch.testing.assert_close(found.loss, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(with_choice(rows[::-1], [0, 0]).loss, wanted, atol=1e-4, rtol=1e-4)
    assert found.row_index.tolist() == [0, 0, 0, 1, 1]


def test_weights_count_in_the_loss_alone():
    values, rows = torch.tensor([-1.0, -2.0]), torch.tensor([0, 1])
    assert BatchLoss(values, rows, weights=torch.tensor([0.0, 0.5])).loss.item() == 1.0
    assert BatchLoss(values, rows).loss.item() == 3.0
