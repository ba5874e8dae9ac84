"""Ensembles against their members one by one, in one pass, and what cannot be one."""

from __future__ import annotations

import pytest
import torch

from oracles.tuned import untrained
from softprompt.artifacts import Manifest
from softprompt.backbone import Fingerprint, load_base
from softprompt.errors import ConfigError, FingerprintError
from softprompt.generation import per_token
from softprompt.inference import Ensemble, load_many
from softprompt.prompts import MultitaskPromptTuningConfig, PromptTuningConfig

TEXTS = ["the cat", "a", "much longer text, with words at the end", "that is it", "oh no"]
LABELS = ("good", "bad thing", "so")


def make(base, seed, length=3, config=None, **changes):
    torch.manual_seed(seed)
    config = config or PromptTuningConfig(num_virtual_tokens=length, task_type="CAUSAL_LM")
    values = {
        "template": "{{input}} =>",
        "task": "classification",
        "labels": LABELS,
        "base_model": str(base.name),
        "base_fingerprint": Fingerprint.of(base.model).to_dict(),
        "max_source_length": 60,
        "max_target_length": 12,
        "dtype": "float32",
        "seq2seq": False,
        **changes,
    }
    return untrained(base, config, Manifest(**values))


@pytest.fixture(scope="module")
def members(folders, tmp_path_factory):
    """Three saved prompts: of two lengths, two templates, two orders of the labels."""
    root = tmp_path_factory.mktemp("members")
    kinds = [
        {"length": 3},
        {"length": 5, "template": "Text: {{input}}\n"},
        {"length": 3, "labels": LABELS[::-1]},
    ]
    for number, kind in enumerate(kinds):
        make(load_base(folders / "llama"), 11 + number, **kind).save(root / str(number))
    return [root / str(number) for number in range(3)]


@pytest.fixture
def prompts(members):
    return load_many(members)


def member_scores(prompts, *, normalize=False):
    """Each member by itself: [M, N, K] in the order of LABELS."""
    return torch.tensor(
        [
            [[answer.scores[label] for label in LABELS] for answer in member.classify(TEXTS, normalize=normalize)]
            for member in prompts
        ]
    )


def test_many_prompts_share_one_base(members, prompts):
    assert len({id(each.base.model) for each in prompts}) == 1
    alone = [load_many([path])[0] for path in members]
    for one, other in zip(alone, prompts, strict=True):
        assert torch.equal(one.prompt().input, other.prompt().input)
        assert one.manifest == other.manifest
        assert one.generate(TEXTS[0], max_new_tokens=4) == other.generate(TEXTS[0], max_new_tokens=4)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_mean_is_that_of_the_members_log_probabilities(prompts, normalize):
    expected = member_scores(prompts, normalize=normalize).mean(dim=0)
    answers = Ensemble(prompts).classify(TEXTS, normalize=normalize)
    for answer, row in zip(answers, expected, strict=True):
        assert list(answer.scores) == list(LABELS)
        torch.testing.assert_close(torch.tensor(list(answer.scores.values())), row, atol=1e-4, rtol=0)
        assert answer.label == LABELS[int(row.argmax())]
        shares = torch.softmax(row, dim=0)
        torch.testing.assert_close(torch.tensor(list(answer.probabilities.values())), shares, atol=1e-4, rtol=0)


def test_the_majority_decides(prompts):
    votes = member_scores(prompts).argmax(dim=2)
    for number, answer in enumerate(Ensemble(prompts, combine="vote").classify(TEXTS)):
        counts = [int((votes[:, number] == k).sum()) for k in range(3)]
        assert list(answer.probabilities.values()) == pytest.approx([c / 3 for c in counts])
        assert counts[LABELS.index(answer.label)] == max(counts)


def test_ties_go_to_the_label_that_is_higher_on_average(prompts):
    scores = torch.tensor([[[-1.0, -2.0, -9.0]], [[-4.0, -1.0, -9.0]], [[-9.0, -9.0, -1.0]]])
    answer = Ensemble(prompts, combine="vote").combined(scores)
    # One vote each; the means are -14/3, -4 and -19/3.
    assert answer.predicted == (1,)
    two = Ensemble(prompts[:2], combine="vote").combined(scores[:2])
    assert two.predicted == (1,)
    assert two.shares.tolist() == [[0.5, 0.5, 0.0]]
    # A label without a vote never wins a tie, however high its mean.
    outside = torch.tensor([[[-1.0, -20.0, -1.1]], [[-20.0, -1.0, -1.1]]])
    assert Ensemble(prompts[:2], combine="vote").combined(outside).predicted[0] in (0, 1)
    assert Ensemble(prompts[:2]).combined(outside).predicted == (2,)


def test_all_prompts_stand_in_one_pass(prompts, monkeypatch):
    engine = prompts[0].engine
    calls = []
    run = engine.target_log_probs

    def spy(rows):
        calls.append((len({row.prompt for row in rows}), len(rows)))
        return run(rows)

    monkeypatch.setattr(engine, "target_log_probs", spy)
    Ensemble(prompts).classify(TEXTS)
    assert calls == [(3, 3 * len(TEXTS) * len(LABELS))]
    before = Ensemble(prompts).classify(TEXTS, batch_size=1000)
    small = Ensemble(prompts).classify(TEXTS, batch_size=4)
    for one, other in zip(before, small, strict=True):
        assert list(one.scores.values()) == pytest.approx(list(other.scores.values()), abs=1e-4)


def test_one_text_and_many(prompts):
    ensemble = Ensemble(prompts)
    assert ensemble(TEXTS[0]) == ensemble(TEXTS)[0] == ensemble(iter(TEXTS))[0]


def test_prompts_on_bases_of_their_own_are_run_on_the_first(members, prompts):
    apart = [load_many([path])[0] for path in members]
    assert Ensemble(apart)(TEXTS) == Ensemble(prompts)(TEXTS)


def test_label_scores_by_token_use_each_members_own_tokens(prompts):
    ensemble = Ensemble(prompts)
    scores = member_scores(prompts)
    lengths = [[len(prompt.rows.label(label)) for label in LABELS] for prompt in prompts]
    expected = torch.stack([per_token(s, n) for s, n in zip(scores, lengths, strict=True)])
    torch.testing.assert_close(ensemble.ranked(scores), expected)


def test_what_cannot_be_an_ensemble(folders, prompts):
    base = load_base(folders / "llama")
    with pytest.raises(ConfigError, match=r"mean, vote, got 'votes' \(did you mean 'vote'"):
        Ensemble(prompts, combine="votes")
    with pytest.raises(ConfigError, match="two prompts or more"):
        Ensemble(prompts[:1])
    with pytest.raises(ConfigError, match="a name of its own"):
        Ensemble(prompts, names=["a", "a", "b"])
    with pytest.raises(ConfigError, match="2 generates free text"):
        Ensemble([prompts[0], make(base, 5, task="generation", labels=None)])
    with pytest.raises(ConfigError, match="differ in 'new', 'so'"):
        Ensemble([prompts[0], make(load_base(folders / "llama"), 5, labels=(*LABELS[:2], "new"))])
    t5, kinds = load_base(folders / "t5"), {"num_virtual_tokens": 3, "task_type": "SEQ_2_SEQ_LM"}
    both = [PromptTuningConfig(**kinds, prompt_sees_input=sees) for sees in (True, False)]
    with pytest.raises(ConfigError, match="share prompt_sees_input, prompts 1 and 2 differ in it"):
        Ensemble([make(t5, 5, config=config, seq2seq=True) for config in both])
    with pytest.raises(FingerprintError, match="share one base, prompts 1 and 2 do not"):
        Ensemble([prompts[0], make(load_base(folders / "other"), 5)])


def test_what_cannot_be_loaded_together(folders, members, tmp_path):
    with pytest.raises(ConfigError, match="one prompt or more, got"):
        load_many([])
    with pytest.raises(ConfigError, match="one prompt or more, got"):
        load_many(str(members[0]))
    make(load_base(folders / "other"), 5).save(tmp_path / "other")
    with pytest.raises(FingerprintError):
        load_many([members[0], tmp_path / "other"])
    make(load_base(folders / "llama"), 5, dtype="bfloat16").save(tmp_path / "half")
    with pytest.raises(ConfigError, match="bfloat16 and float32; choose with --torch-dtype"):
        load_many([members[0], tmp_path / "half"])
    assert len(load_many([members[0], tmp_path / "half"], torch_dtype="float32")) == 2


def seq2seq_prompt(base, seed, types):
    config = PromptTuningConfig(
        num_virtual_tokens=3,
        task_type="SEQ_2_SEQ_LM",
        output_model_types=types,
        num_transformer_submodules=len(types),
    )
    return make(base, seed, config=config, seq2seq=True)


def test_seq2seq_members_stand_in_their_own_parts_of_the_model(folders):
    kinds = (["ENCODER"], ["DECODER"], ["ENCODER", "DECODER"], ["DECODER"])
    each = [seq2seq_prompt(load_base(folders / "t5"), 20 + n, t) for n, t in enumerate(kinds)]
    scores = member_scores(each)
    ensemble = Ensemble(each)
    found = ensemble.scores([member.sources(TEXTS)[0] for member in each], batch_size=7)
    torch.testing.assert_close(found, scores, atol=1e-4, rtol=0)
    for member, alone in zip(each, scores, strict=True):
        twice = Ensemble([member, member]).classify(TEXTS)
        both = torch.tensor([list(answer.scores.values()) for answer in twice])
        torch.testing.assert_close(both, alone, atol=1e-4, rtol=0)


def multitask_prompt(base, seed, **changes):
    config = MultitaskPromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", num_tasks=2, num_ranks=1)
    told = {"template": "{{input}} =>", "task": "classification", "labels": list(LABELS)}
    free = {"template": "{{input}}", "task": "generation", "labels": None}
    values = {
        "tasks": ("free", "sort"),
        "data": {"tasks": {"free": free, "sort": told}},
        "task": "generation",
        "labels": None,
        **changes,
    }
    return make(base, seed, config=config, **values)


def test_one_task_is_chosen_for_all_members_that_have_several(folders, prompts):
    several = [multitask_prompt(load_base(folders / "llama"), seed) for seed in (5, 6)]
    expected = member_scores([*(each.of_task("sort") for each in several), prompts[0]])
    ensemble = Ensemble([*several, prompts[0]], task="sort")
    found = torch.tensor([list(a.scores.values()) for a in ensemble.classify(TEXTS)])
    torch.testing.assert_close(found, expected.mean(dim=0), atol=1e-4, rtol=0)
    again = ensemble.of_task("sort")
    assert (again.names, again.labels, again(TEXTS)) == (
        ensemble.names,
        LABELS,
        ensemble(TEXTS),
    )
    with pytest.raises(
        ConfigError,
        match=r"has 2 tasks \(free, sort\); choose one by name or number: task_name=.*--task-name",
    ):
        Ensemble(several)
    with pytest.raises(ConfigError, match="no task 'sorted'"):
        Ensemble(several, task="sorted")
    with pytest.raises(ConfigError, match="would be ignored, as no member"):
        Ensemble(prompts, task="sort")
