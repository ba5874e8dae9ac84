"""Keys and values that start at demonstrations: which, the mask of leave one out against a model's own, dropout."""

import json

import pytest
import torch
from transformers import DynamicCache

from oracles.caches import CACHE
from oracles.slow import only
from softprompt import CartridgeConfig, PrefixTuningConfig
from softprompt.backbone import key_values, load_base
from softprompt.engine import EngineRow, ForestEngine, PlainEngine
from softprompt.errors import ConfigError
from softprompt.prompts import Prompt
from softprompt.training import TuneSettings, tune
from softprompt.training.examples import read_data
from softprompt.training.gradients import Step
from softprompt.training.preparation import prepare
from softprompt.training.session import candidate_of
from softprompt.training.state import RunState

QUICK = {"method": "prefix", "demonstrations": 3, "batch_size": 4, "max_steps": 6, "silence_progress_bars": True}


def prepared(base, rows, **options):
    settings = TuneSettings.from_dict(QUICK | options)
    return prepare(base, read_data(rows, None, settings), settings)


def test_left_out_tokens_are_those_that_a_models_mask_hides(llama):
    base = load_base(llama)
    source, target, hidden = (4, 9, 11), (5, 6, 1), {1, 2, 5}
    whole = key_values(base.model, [4, 8, 9, 10, 11, 12, 7, 5])  # [L, 2, A_kv, P, D]
    count = whole.shape[3]
    prompt = Prompt(prefix=whole).without(hidden)
    assert prompt.prefix_tokens == 5

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(whole):
        cache.update(keys[None], values[None], layer)
    ids = torch.tensor([[*source, *target[:-1]]])
    mask = torch.tensor([[int(i not in hidden) for i in range(count)] + [1] * ids.shape[1]])
    positions = torch.arange(count, count + ids.shape[1])[None]
    with torch.no_grad():
        logits = base.model(ids, attention_mask=mask, position_ids=positions, **{CACHE: cache}).logits[0]
    log_probs = logits.log_softmax(-1)[len(source) - 1 :]
    expected = [log_probs[i, token].item() for i, token in enumerate(target)]
    unlike = PlainEngine(base).target_log_probs([EngineRow(source, target, Prompt(prefix=prompt.prefix))])
    for engine in (PlainEngine(base), ForestEngine(base)):
        found = engine.target_log_probs([EngineRow(source, target, prompt)]).values.tolist()
        assert found == pytest.approx(expected, abs=1e-5)
        assert unlike.values.tolist() != pytest.approx(expected, abs=1e-4)  # its text would stand too early


def test_the_prompt_is_as_long_as_the_demonstrations_and_starts_at_their_keys_and_values(llama, rows):
    first = prepared(llama, rows, max_steps=1)
    tokenizer = first.tasks[0].tokenizer
    chosen = [rows[0], rows[1], rows[2]]  # yes, no, yes: the labels in turns
    ids = []
    for record in chosen:
        ids += [*tokenizer.source({"input": record["input"]})[0], *tokenizer.target(record["output"])]
    assert first.config.num_virtual_tokens == len(ids)
    torch.testing.assert_close(first.module.prompt().prefix.detach(), key_values(first.base.model, ids))


def test_labels_come_in_turns(llama, rows):
    by_label = sorted(rows, key=lambda row: row["output"])
    first = prepared(llama, by_label, demonstrations=4)
    targets = [row.target for row in first.hidden]
    assert targets == [targets[0], targets[1]] * 2
    assert targets[0] != targets[1]
    texts = prepared(llama, by_label, demonstrations=4, task="generation")
    assert [row.target for row in texts.hidden] == [targets[0]] * len(texts.hidden), "in their own order"


def test_a_demonstration_does_not_see_itself_and_the_others_share_one_prompt(llama, rows):
    first = prepared(llama, rows)
    stage = candidate_of(first).stage
    step = Step(stage, RunState(), [list(range(5))])
    found, _ = step.rows(list(range(5)))
    length = first.config.num_virtual_tokens
    seen = [set(row.prompt.prefix_places[:-1]) for row in found]
    hidden = [set(range(length)) - each for each in seen]
    assert hidden[3] == hidden[4] == set()
    assert found[3].prompt is found[4].prompt
    assert set.union(*hidden[:3]) == set(range(1, length))  # each token of some demonstration, but for the first
    assert not hidden[0] & hidden[1]
    assert all(row.prefix_positions == length for row in found)
    everything = prepared(llama, rows, leave_one_out=False)
    assert everything.hidden == {}


def test_each_update_leaves_out_other_tokens_and_the_seed_decides(llama, rows):
    first = prepared(llama, rows, demonstrations=None, tuning_config={"num_virtual_tokens": 12}, token_dropout=0.4)
    stage = candidate_of(first).stage

    def places(update):
        found, _ = Step(stage, RunState(update=update), [[0, 1]]).rows([0, 1])
        assert found[0].prompt is found[1].prompt
        return found[0].prompt.prefix_places

    drawn = [places(update) for update in range(20)]
    assert drawn == [places(update) for update in range(20)]
    assert len(set(drawn)) > 10
    assert all(each[0] == 0 and each[-1] == 12 for each in drawn)
    assert 0.45 < sum(len(each) - 1 for each in drawn) / (20 * 12) < 0.8


@pytest.mark.parametrize("method", only(["cartridge"], ["prefix", "cartridge"]))
def test_it_learns_from_demonstrations_to_the_artifact(llama, rows, held_out, tmp_path, method):
    options = QUICK | {"method": method, "token_dropout": 0.1, "max_steps": 24}
    tuned = tune(llama, rows, held_out, output=tmp_path / "out", **options)
    assert tuned.history[-1]["loss"] < tuned.history[0]["loss"]
    record = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert record["num_virtual_tokens"] == tuned.module.prompt().prefix_tokens
    again = tune(llama, rows, held_out, **options)
    assert again.history == tuned.history


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"method": "prompt_tuning"}, "demonstrations would be ignored with tuning_type PROMPT_TUNING"),
        ({"tuning_config": {"num_virtual_tokens": 5}}, "num_virtual_tokens would be ignored"),
        ({"demonstrations": None, "leave_one_out": False}, "leave_one_out would be ignored"),
        ({"tuning_config": {"prefix_tuning_init_text": "film"}}, "prefix_tuning_init_text and demonstrations both"),
        ({"demonstrations": 50}, "demonstrations is 50, there are 22 training records"),
        ({"config": PrefixTuningConfig(num_virtual_tokens=5)}, "num_virtual_tokens and demonstrations both"),
        ({"config": CartridgeConfig(num_virtual_tokens=5)}, "num_virtual_tokens and demonstrations both"),
    ],
)
def test_what_would_be_ignored_is_refused(llama, rows, options, error):
    with pytest.raises(ConfigError, match=error):
        tune(
            llama, rows, **{k: v for k, v in (QUICK | options).items() if k != "method" or "config" not in options}
        )


def test_a_seq2seq_base_is_refused(bases, rows):
    with pytest.raises(ConfigError, match="demonstrations need a causal base"):
        tune(bases / "bart", rows, **QUICK)
