"""Composed prompts as folders: rows, record, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings

import peft
import pytest
import torch

from oracles.stored import drawn, folder
from softprompt.artifacts import (
    average_prompts,
    concatenate_prompts,
    load_adapter,
    subtract_prompts,
)
from softprompt.errors import ArtifactError, ConfigError, FingerprintError, OutputExistsError

BOTH = {"peft_type": "EXTENDED_PROMPT_TUNING", "output_model_types": ["ENCODER", "DECODER"]}


@pytest.fixture
def pair(tmp_path):
    return [folder(tmp_path / name, drawn(i)) for i, name in enumerate(("a", "b"))]


def test_the_average_on_disk_is_the_average_of_the_rows(tmp_path, pair):
    average_prompts(pair, tmp_path / "out", weights=[3, 1])
    made = load_adapter(tmp_path / "out")
    torch.testing.assert_close(made.values, 0.75 * drawn(0) + 0.25 * drawn(1))


def test_the_result_says_what_it_was_made_of_and_claims_no_results(tmp_path, pair):
    average_prompts(pair, tmp_path / "out", weights=[3, 1])
    record = load_adapter(tmp_path / "out").manifest
    sources = [load_adapter(path).manifest for path in pair]
    assert record.metrics == {}
    assert record.history == []
    assert record.settings["composition"] == {"operation": "average", "weights": [3.0, 1.0]}
    assert record.settings["input_field"] == "question"
    assert "learning_rate" not in record.settings
    made_of = list(record.data["made_of"].values())
    assert [each["prompt"] for each in made_of] == [str(path) for path in pair]
    assert [each["weights_sha256"] for each in made_of] == [s.weights_sha256 for s in sources]
    for name in ("template", "labels", "base_fingerprint", "max_source_length", "task"):
        assert getattr(record, name) == getattr(sources[0], name)


def test_peft_reads_the_configuration(tmp_path, pair):
    concatenate_prompts(pair, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = peft.PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.num_virtual_tokens, config.token_dim, config.peft_type) == (
        6,
        8,
        "PROMPT_TUNING",
    )


def test_unlike_lengths_are_joined_or_resized_on_demand(tmp_path, pair):
    longer = folder(tmp_path / "longer", drawn(5, 5))
    with pytest.raises(ConfigError, match="one length, got 3, 5"):
        average_prompts([pair[0], longer])
    made = average_prompts([pair[0], longer], num_virtual_tokens=4)
    tiled = torch.cat([drawn(0), drawn(0)[:1]])
    torch.testing.assert_close(made.values, (tiled + drawn(5, 5)[:4]) / 2)
    assert made.config["num_virtual_tokens"] == 4
    joined = concatenate_prompts([pair[0], longer], tmp_path / "joined")
    assert torch.equal(joined.values, torch.cat([drawn(0), drawn(5, 5)]))
    assert load_adapter(tmp_path / "joined").config["num_virtual_tokens"] == 8


def test_a_difference_alone_and_added(tmp_path, pair):
    third = folder(tmp_path / "c", drawn(2))
    torch.testing.assert_close(subtract_prompts(*pair).values, drawn(0) - drawn(1))
    made = subtract_prompts(*pair, tmp_path / "out", onto=third, scale=0.5)
    torch.testing.assert_close(made.values, drawn(2) + 0.5 * (drawn(0) - drawn(1)))
    assert made.manifest.settings["composition"] == {
        "operation": "difference",
        "scale": 0.5,
        "added_to_last": True,
    }
    assert len(made.manifest.data["made_of"]) == 3


def test_other_bases_are_refused(tmp_path, pair):
    other = folder(tmp_path / "other", drawn(3), base="two")
    with pytest.raises(FingerprintError, match=r"its base is two, not one"):
        average_prompts([pair[0], other])
    wide = folder(tmp_path / "wide", drawn(3, 3, 9))
    with pytest.raises(FingerprintError, match="9 wide, not 8"):
        concatenate_prompts([pair[0], wide])


def test_keys_and_values_do_not_go_together_with_virtual_tokens(tmp_path, pair):
    other = folder(tmp_path / "other", drawn(3, 3, 16))
    path = other / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "CARTRIDGE"}))
    for prompts in ([pair[0], other], [other, pair[0]]):
        with pytest.raises(
            ConfigError, match=r"other is keys and values .*, .* is virtual tokens of the input; only"
        ):
            concatenate_prompts(prompts)


@pytest.mark.parametrize(
    "change",
    [
        {"template": "Text: {{input}}"},
        pytest.param({"labels": ("x", "y")}, marks=pytest.mark.slow),
        pytest.param({"task": "generation"}, marks=pytest.mark.slow),
        pytest.param({"max_source_length": 20}, marks=pytest.mark.slow),
        pytest.param({"max_target_length": 4}, marks=pytest.mark.slow),
        {"dtype": "bfloat16"},
    ],
)
def test_records_that_differ_need_a_choice(tmp_path, pair, change):
    other = folder(tmp_path / "other", drawn(3), **change)
    (name,) = change
    with pytest.raises(ConfigError, match=f"differ in {name}: .*--template-from"):
        average_prompts([pair[0], other])
    made = average_prompts([pair[0], other], template_from=other)
    assert getattr(made.manifest, name) == change[name]
    with pytest.raises(ConfigError, match="one of the prompts themselves"):
        average_prompts([pair[0], other], template_from=pair[1])


def test_the_order_of_labels_does_not_matter(tmp_path, pair):
    other = folder(tmp_path / "other", drawn(3), labels=("poor", "good"))
    assert average_prompts([pair[0], other]).manifest.labels == ("good", "poor")


def test_options_must_agree_and_are_kept(tmp_path, pair):
    suffix = {"placement": "suffix"}
    ends = [folder(tmp_path / f"s{i}", drawn(i), options=suffix) for i in range(2)]
    made = average_prompts(ends, tmp_path / "out")
    assert made.config["placement"] == "suffix"
    assert load_adapter(tmp_path / "out").config["peft_type"] == "EXTENDED_PROMPT_TUNING"
    with pytest.raises(ConfigError, match=r"has the options \{'placement'"):
        average_prompts([ends[0], pair[0]])


def test_nothing_is_overwritten_unasked(tmp_path, pair):
    before = load_adapter(pair[1]).values
    with pytest.raises(OutputExistsError):
        average_prompts(pair, pair[1])
    assert torch.equal(load_adapter(pair[1]).values, before)
    average_prompts(pair, pair[1], overwrite=True)
    assert not torch.equal(load_adapter(pair[1]).values, before)
    with pytest.raises(ConfigError, match="no meaning without output"):
        average_prompts(pair, overwrite=True)


def test_prompts_that_peft_wrote(tmp_path, pair, caplog):
    plain = [folder(tmp_path / f"p{i}", drawn(i), manifest=False) for i in range(2)]
    assert average_prompts([plain[0], pair[0]]).manifest.data["made_of"]["1"]["weights_sha256"] is None
    with caplog.at_level(logging.WARNING, "softprompt"):
        made = average_prompts(plain, tmp_path / "out")
    assert "does not say what it was made of" in caplog.text
    assert made.manifest is None
    assert load_adapter(tmp_path / "out").manifest is None
    other = folder(tmp_path / "p2", drawn(2), base="two", manifest=False)
    with pytest.raises(FingerprintError, match="not both have a fingerprint"):
        average_prompts([plain[0], other])


def test_pefts_second_half_of_a_seq2seq_prompt_is_left_out(tmp_path):
    stored = load_adapter(folder(tmp_path / "a", drawn(0, 4)))
    config = stored.config | {
        "task_type": "SEQ_2_SEQ_LM",
        "num_virtual_tokens": 2,
        "num_transformer_submodules": 2,
    }
    prompt = dataclasses.replace(stored, config=config).prompt()
    assert prompt.decoder is None
    assert torch.equal(prompt.input, drawn(0, 4)[:2])
    both = config | BOTH
    prompt = dataclasses.replace(stored, config=both).prompt()
    assert torch.equal(prompt.input, drawn(0, 4)[:2])
    assert torch.equal(prompt.decoder, drawn(0, 4)[2:])


def test_what_is_more_than_rows_is_refused(tmp_path, pair):
    stored = load_adapter(pair[0])
    headed = dataclasses.replace(stored, tensors=stored.tensors | {"base_model.score.weight": drawn(1)})
    with pytest.raises(ArtifactError, match=r"trained parts besides its virtual tokens .base_model.score.weight"):
        headed.prompt()
    keyed = dataclasses.replace(stored, config=stored.config | {"peft_type": "PREFIX_TUNING"})
    with pytest.raises(ArtifactError, match="keys and values of every layer"):
        keyed.prompt()


def test_too_few_prompts(pair):
    for given in ([], pair[:1], str(pair[0])):
        with pytest.raises(ConfigError, match="2 prompts or more"):
            concatenate_prompts(given)


def test_a_base_that_is_not_known_is_told_by_its_name(tmp_path, pair):
    unknown = folder(tmp_path / "u", drawn(7), base_fingerprint={})
    torch.testing.assert_close(average_prompts([pair[0], unknown]).values, (drawn(0) + drawn(7)) / 2)
    average_prompts([unknown, unknown])
    other = folder(tmp_path / "o", drawn(7), base="two", base_fingerprint={})
    with pytest.raises(FingerprintError, match="its base is two, not one, and not both"):
        average_prompts([pair[0], other])


def test_the_rows_that_are_run_are_the_same_for_every_use(tmp_path):
    """Composition, comparison and conversion read one rule, context prompts included."""
    from softprompt.artifacts.formats.format import plain_prompt

    stored = load_adapter(folder(tmp_path / "a", drawn(0, 4)))
    two = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 2, "num_transformer_submodules": 2}
    extended = {"peft_type": "EXTENDED_PROMPT_TUNING", "placement": "prefix"}
    for change in (
        {"peft_type": "CPT"},
        {"peft_type": "P_TUNING"},
        two,
        two | BOTH,
        two | extended,
    ):
        each = dataclasses.replace(stored, config=stored.config | change)
        plain = plain_prompt(each, "caikit")
        for part, written in zip(each.prompt().tensors, plain.tensors, strict=True):
            assert torch.equal(part, written)


def test_context_prompts_are_composed_to_plain_ones(tmp_path, pair):
    cpt = {"peft_type": "CPT", "cpt_token_ids": [1, 2, 3], "opt_loss_decay_factor": 1.0}
    made = average_prompts([folder(tmp_path / f"c{i}", drawn(i), options=cpt) for i in range(2)])
    assert made.config["peft_type"] == "PROMPT_TUNING"
    torch.testing.assert_close(made.values, (drawn(0) + drawn(1)) / 2)
