"""Every method through the same loop: starts, resumes, learning rates of keys and values, CPT's loss."""

import json
import os
import signal
from shutil import copytree

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from oracles.slow import only
from softprompt import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from softprompt.backbone import input_embedding, key_values, load_base, text_key_values
from softprompt.engine import EngineRow, build_engine
from softprompt.errors import ConfigError, ContextOverflowError, TrainingInterrupted
from softprompt.evaluation import evaluate
from softprompt.inference import load
from softprompt.prompts import context_labels, cpt_columns, cpt_loss
from softprompt.training import Events, TuneSettings, read_run, tune
from softprompt.training.objectives import ContextLikelihood
from softprompt.training.optimisation import Rates, build_optimizer, set_rates

TEXT = "good film news"
METHODS = {
    "prompt_tuning": {"tuning_config": {"num_virtual_tokens": 3}},
    "low_rank": {
        "tuning_config": {
            "num_virtual_tokens": 3,
            "parameterization": "low_rank",
            "parameterization_rank": 2,
        }
    },
    "ulpt": {
        "tuning_config": {
            "num_virtual_tokens": 3,
            "parameterization": "ulpt",
            "parameterization_rank": 2,
        }
    },
    "residual": {"tuning_config": {"num_virtual_tokens": 3, "parameterization": "residual"}},
    "superpos": {
        "tuning_config": {"num_virtual_tokens": 3, "parameterization": "superpos", "parameterization_rank": 6}
    },
    "multitask": {"method": "multitask", "tuning_config": {"num_virtual_tokens": 3}},
    "mlp": {"method": "p_tuning", "tuning_config": {"num_virtual_tokens": 3}},
    "lstm": {
        "method": "p_tuning",
        "tuning_config": {
            "num_virtual_tokens": 3,
            "encoder_reparameterization_type": "LSTM",
            "encoder_dropout": 0.2,
        },
    },
    "prefix": {"method": "prefix", "tuning_config": {"num_virtual_tokens": 3}},
    "projection": {
        "method": "prefix",
        "tuning_config": {"num_virtual_tokens": 3, "prefix_projection": True},
    },
    "frozen first": {
        "method": "prefix",
        "tuning_config": {
            "num_virtual_tokens": 3,
            "prefix_tuning_init_text": TEXT,
            "freeze_first_token": True,
        },
    },
    "cartridge": {"method": "cartridge", "tuning_config": {"num_virtual_tokens": 3}},
    "cpt": {"method": "cpt", "tuning_config": {"opt_projection_epsilon": 2.0}},
}
SEQ2SEQ = ["prompt_tuning", "multitask", "mlp", "prefix", "cartridge"]
QUICK = {"num_epochs": 2, "batch_size": 4, "accumulate_steps": 2}


def values_of(tuned):
    return {name: value.clone() for name, value in tuned.module.state_dict().items()}


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("base", "name"),
    only(
        [("llama", "prompt_tuning"), ("llama", "mlp"), ("llama", "cpt"), ("bart", "prefix")],
        [("llama", n) for n in METHODS] + [("bart", n) for n in SEQ2SEQ],
    ),
)
def test_trained_validated_saved_and_used_again(bases, rows, held_out, tmp_path, base, name):
    options = METHODS[name] | {"num_epochs": 4, "batch_size": 6}
    tuned = tune(bases / base, rows, held_out, output=tmp_path / "out", **options)
    assert tuned.history[-1]["loss"] < tuned.history[0]["loss"]
    loaded = load(tmp_path / "out")
    texts = [row["input"] for row in held_out]
    scores = [dict(each.scores) for each in tuned.classify(texts)]
    for found, own in zip(loaded.classify(texts), scores, strict=True):
        assert dict(found.scores) == pytest.approx(own, abs=1e-5)
    limit = {"max_new_tokens": 3}
    answers = [each.text for each in tuned.generate(texts, **limit)]
    assert [each.text for each in loaded.generate(texts, **limit)] == answers
    assert evaluate(loaded, held_out).accuracy == tuned.metrics["validation"]["accuracy"]


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adafactor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", only(["lstm", "cartridge"], METHODS))
def test_a_resumed_run_ends_bit_equal(llama, rows, held_out, tmp_path, monkeypatch, name, optimizer):
    options = METHODS[name] | QUICK | {"optimizer": optimizer, "keep_dropout": True}
    straight = tune(llama, rows, held_out, output=tmp_path / "a", **options)
    update = Events.update

    def interrupt(self, state, loss):
        update(self, state, loss)
        if state.update == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Events, "update", interrupt)
        with pytest.raises(TrainingInterrupted, match="after update 4 "):
            tune(llama, rows, held_out, output=tmp_path / "b", **options)
    resumed = tune(llama, rows, held_out, output=tmp_path / "b", resume=True)
    assert same(values_of(resumed), values_of(straight))
    assert resumed.history == straight.history
    texts = [(tmp_path / folder / "run.toml").read_text() for folder in "ab"]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(num_virtual_tokens=3, parameterization="ulpt", parameterization_rank=2),
        pytest.param(MultitaskPromptTuningConfig(num_virtual_tokens=3, num_ranks=2), marks=pytest.mark.slow),
        pytest.param(PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=5), marks=pytest.mark.slow),
        pytest.param(PrefixTuningConfig(num_virtual_tokens=3, init_weights="zero"), marks=pytest.mark.slow),
        pytest.param(CartridgeConfig(num_virtual_tokens=3, num_frozen_tokens=2), marks=pytest.mark.slow),
        CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7], cpt_tokens_type_mask=[1, 2, 4]),
    ],
    ids=lambda config: str(config.peft_type),
)
def test_a_configuration_says_it_as_well_and_its_run_repeats(llama, rows, tmp_path, config):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = config.to_dict()
    tuned = tune(llama, data, output=tmp_path / "a", config=config, num_epochs=1)
    assert config.to_dict() == given
    assert tuned.config.peft_type == config.peft_type
    again = tune(**read_run(tmp_path / "a" / "run.toml"), output=tmp_path / "b")
    assert same(values_of(again), values_of(tuned))
    texts = [(tmp_path / name / "run.toml").read_text() for name in "ab"]
    assert texts[0] == texts[1]
    assert "[config]" in texts[0]


def test_a_configuration_of_another_task_is_refused(llama, rows):
    with pytest.raises(ConfigError, match="config has task_type SEQ_2_SEQ_LM"):
        tune(llama, rows, config=PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="num_tasks is 3, the data has 1"):
        tune(llama, rows, config=MultitaskPromptTuningConfig(num_virtual_tokens=2, num_tasks=3))


STILL = {"num_epochs": 1, "learning_rate": 1e-30}


@pytest.mark.parametrize("method", ["prefix", "cartridge"])
def test_keys_and_values_start_at_the_first_records(llama, rows, caplog, method):
    caplog.set_level("INFO", "softprompt")
    tuning = {"num_virtual_tokens": 9}
    tuned = tune(llama, rows, method=method, tuning_config=tuning, **STILL)
    row = tuned.rows
    first = [*row.source(rows[0])[0], *row.target(rows[0]["output"])]
    second = [*row.source(rows[1])[0]]
    expected = text_key_values(tuned.base.model, [*first, *second][:9])
    torch.testing.assert_close(tuned.prompt().prefix, expected)
    assert "start at those of the first training records, 9 tokens" in caplog.text


def test_keys_and_values_start_otherwise_when_told(llama, bases, rows, caplog):
    caplog.set_level("INFO", "softprompt")
    tuning = {"num_virtual_tokens": 4}
    drawn = tune(llama, rows, method="prefix", init_from_records=False, tuning_config=tuning, **STILL)
    assert drawn.prompt().prefix.square().mean().sqrt().item() == pytest.approx(1, rel=0.2)
    zero = tuning | {"init_weights": "zero"}
    zero = tune(llama, rows, method="prefix", tuning_config=zero, **STILL)
    assert zero.prompt().prefix.abs().max() < 1e-20
    text = tuning | {"cartridge_init_text": TEXT}
    text = tune(llama, rows, method="cartridge", tuning_config=text, **STILL)
    ids = (text.tokenizer(TEXT)["input_ids"] * 4)[:4]
    torch.testing.assert_close(text.prompt().prefix, text_key_values(text.base.model, ids))
    assert "first training records" not in caplog.text
    tune(bases / "bart", rows, method="prefix", tuning_config=tuning, **STILL)
    assert "the keys and values start at random" in caplog.text


def test_frozen_tokens_stay(llama, rows):
    for method, more in (
        ("cartridge", {"num_frozen_tokens": 2}),
        ("prefix", {"prefix_tuning_init_text": TEXT, "freeze_first_token": True}),
    ):
        tuning = {"num_virtual_tokens": 4, **more}
        start = tune(llama, rows, method=method, tuning_config=tuning, **STILL).prompt().prefix
        found = tune(llama, rows, method=method, tuning_config=tuning, num_epochs=1).prompt().prefix
        kept = more.get("num_frozen_tokens", 1)
        assert torch.equal(found[..., :kept, :], start[..., :kept, :])
        assert (found[..., kept:, :] != start[..., kept:, :]).any(dim=-1).all()


def test_something_is_left_to_train(llama, rows):
    tuning = {"num_virtual_tokens": 3, "num_frozen_tokens": 3}
    with pytest.raises(ConfigError, match="leaves no virtual token to train"):
        tune(llama, rows, method="cartridge", tuning_config=tuning)


@pytest.mark.parametrize("base", ["llama", "bart"])
def test_a_configuration_of_several_tasks_has_teachers_too(bases, rows, base):
    """PEFT's default feeds both parts of a seq2seq model, and so do the teachers."""
    config = MultitaskPromptTuningConfig(num_virtual_tokens=3)
    tuned = tune(bases / base, {"a": rows[:8], "b": rows[8:]}, config=config, num_epochs=1)
    assert tuned.config.num_tasks == tuned.module.num_tasks == 2
    assert tuned.config.num_transformer_submodules == (2 if base == "bart" else 1)
    assert "teachers" in tuned.metrics


def test_the_rate_of_keys_and_values_is_relative_to_each_layers(llama, rows, caplog):
    caplog.set_level("INFO", "softprompt")
    tuning = {"num_virtual_tokens": 6}
    options = {"method": "prefix", "tuning_config": tuning, "num_epochs": 1, "batch_size": 22}
    start = tune(llama, rows, **options | STILL).prompt().prefix
    tuned = tune(llama, rows, max_grad_norm=0.0, schedule="constant", warmup_ratio=0.0, **options)
    own = start.square().mean(dim=(2, 3, 4)).sqrt()  # [L, 2]
    step = (tuned.prompt().prefix - start).abs().amax(dim=(2, 3, 4))
    # The first step of Adam is the learning rate, whatever the gradient.
    from softprompt.training.settings import KEY_VALUE_RATE_PER_RMS

    assert len(own) < 4  # of more layers it is less, see below
    torch.testing.assert_close(step / own, torch.full_like(own, KEY_VALUE_RATE_PER_RMS), rtol=1e-3, atol=0)
    overall = own.square().mean().sqrt().item()
    rate = KEY_VALUE_RATE_PER_RMS * overall
    assert tuned.metrics["learning_rate"] == pytest.approx(rate, rel=1e-4)
    assert f"learning rate {rate:.4g} ({KEY_VALUE_RATE_PER_RMS:g} x the rms of keys and values" in caplog.text


def test_keys_and_values_of_many_layers_learn_slowly_which_is_no_collapse(llama, rows, tmp_path, caplog):
    deep = copytree(llama, tmp_path / "deep")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(llama, num_hidden_layers=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(deep)
    caplog.set_level("INFO", "softprompt")
    options = {"method": "prefix", "tuning_config": {"num_virtual_tokens": 6}, "max_steps": 8, "batch_size": 4}
    tune(deep, rows, **options)
    assert f"({0.2 * (4 / 8) ** 1.3:g} x the rms of keys and values" in caplog.text
    assert "barely moved" not in caplog.text
    with caplog.at_level("WARNING"):
        tune(deep, rows, learning_rate=1e-5, **options)
    assert "barely moved" in caplog.text


class Flat(torch.nn.Module):
    """Keys and values of two layers, ``[P, L·2·A_kv·D]``, as one parameter."""

    def __init__(self, values):
        super().__init__()
        self.embedding = torch.nn.Embedding.from_pretrained(values.clone(), freeze=False)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_scaled_steps_are_those_of_one_parameter_for_each_layer(optimizer):
    """The slow reference: each layer's keys and values in a tensor and a group of their own."""
    torch.manual_seed(0)
    scales = torch.tensor([[0.5, 2.0], [1.0, 0.1]])
    whole = torch.randn(3, 4 * 5)
    settings = TuneSettings(optimizer=optimizer, weight_decay=0.05)
    module = Flat(whole)
    found = build_optimizer(settings, module, Rates(0.1, scales=scales))
    parts = torch.nn.ParameterList(torch.nn.Parameter(part.clone()) for part in whole.view(3, 4, 5).unbind(1))
    oracle = build_optimizer(settings, parts, Rates(0.1))
    for group, scale in zip(oracle.param_groups, scales.flatten().tolist(), strict=True):
        group["peak"] *= scale
    target = torch.randn(3, 4 * 5)
    for step in range(12):
        for parameter in (*module.parameters(), *parts):
            parameter.grad = None
        together = torch.stack(list(parts), dim=1).flatten(1)
        for value, chosen in ((module.embedding.weight, found), (together, oracle)):
            ((value - target).pow(4).sum() + value.prod(dim=1).sin().sum()).backward()
            set_rates(chosen, 1 - step / 20)
            chosen.step()
        together = torch.stack(list(parts), dim=1).flatten(1)
        torch.testing.assert_close(module.embedding.weight, together, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_dropout_of_a_network_is_seeded_and_off_in_validation(llama, rows, held_out):
    options = METHODS["lstm"] | QUICK
    torch.manual_seed(1)
    first = tune(llama, rows, held_out, **options)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    again = tune(llama, rows, held_out, **options)
    assert torch.equal(drawn, torch.rand(3))
    assert same(values_of(first), values_of(again))
    assert not first.module.training
    tuning = {**options["tuning_config"], "encoder_dropout": 0.0}
    without = tune(llama, rows, held_out, **options | {"tuning_config": tuning})
    assert not same(values_of(first), values_of(without))


def test_a_context_is_the_first_records_in_four_kinds(llama, rows, caplog):
    caplog.set_level("INFO", "softprompt")
    verbalizer = "this is : {{input}} ?"
    tuned = tune(llama, rows, method="cpt", verbalizer=verbalizer, context_records=2, **STILL)
    ids, kinds = [], []
    for number, row in enumerate(rows[:2]):
        source, target = tuned.rows.source(row)[0], tuned.rows.target(row["output"])
        ids += [*source, *target]
        words = [1, 1, 1, *[2] * (len(source) - 4), 3, *[4] * len(target)]
        kinds += [kind + 4 * number for kind in words]
    assert tuned.config.cpt_token_ids == ids
    assert tuned.config.cpt_tokens_type_mask == kinds
    assert tuned.config.num_virtual_tokens == len(ids)
    table = input_embedding(tuned.base.model)
    torch.testing.assert_close(tuned.prompt().input, table(torch.tensor(ids)))
    assert f"the context is the first 2 training records, {len(ids)} tokens" in caplog.text


def test_a_context_leaves_room_for_the_rows(llama, rows):
    long = [{"input": "film " * 24, "output": "yes"}, *rows]
    tuned = tune(llama, long, method="cpt", num_epochs=1)
    assert len(tuned.config.cpt_token_ids) + 26 <= 64
    with pytest.raises(ContextOverflowError):
        tune(llama, long, method="cpt", num_epochs=1, context_records=6)


def test_moves_stay_in_their_balls_and_labels_stay(llama, rows):
    tuned = tune(llama, rows, method="cpt", num_epochs=2, learning_rate=1.0)
    moves = tuned.module.delta_embedding.weight.norm(dim=1)
    radius = tuned.module.radius[:, 0]
    assert (moves <= radius * 1.0001).all()
    labels = torch.tensor(tuned.config.cpt_tokens_type_mask) % 4 == 0
    assert (moves[labels] < 1e-9).all()
    assert (moves[~labels] > 0.5 * radius[~labels]).all()


@pytest.mark.parametrize(
    "weighting",
    [{}, {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.7}],
    ids=["none", "decay"],
)
@pytest.mark.parametrize("kinds", [[1, 2, 3, 4, 4, 5, 6, 7, 8], [4, 4, 2, 4, 5, 6, 7, 8, 8], [1] * 9])
def test_the_loss_of_a_context_is_pefts(llama, kinds, weighting):
    """Labels of the context once for the batch, against PEFT's layout: the context in every row."""
    config = CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=[5, 6, 7, 8, 1, 9, 10, 11, 12],
        cpt_tokens_type_mask=kinds,
        **weighting,
    )
    base = load_base(llama)
    table = input_embedding(base.model)
    values = table(torch.tensor(config.cpt_token_ids)).detach().clone()
    values[torch.tensor(kinds) % 4 != 0] += 0.05
    values.requires_grad_()
    texts = [((5, 9), (6, 1)), ((7, 8, 9, 10), (11, 12, 1)), ((4,), (3,))]
    width = max(len(source) + len(target) for source, target in texts)
    ids, labels = torch.zeros(3, width, dtype=torch.long), torch.full((3, width), -100)
    for number, (source, target) in enumerate(texts):
        ids[number, : len(source) + len(target)] = torch.tensor([*source, *target])
        labels[number, len(source) : len(source) + len(target)] = torch.tensor(target)
    whole = torch.cat([values.expand(3, -1, -1), table(ids).detach()], dim=1)
    logits = base.model(inputs_embeds=whole).logits
    expected = cpt_loss(logits, *cpt_columns(config, labels), config)
    (wanted,) = torch.autograd.grad(expected, values)

    objective = ContextLikelihood(build_engine(base), context_labels(config))
    prompt = config.prompt_of(values)
    part = objective([EngineRow(*text, prompt) for text in texts], [0, 0, 0])
    targets = sum(len(target) for _, target in texts)
    loss = part.loss / (targets + 3 * objective.tokens_per_row)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    (found,) = torch.autograd.grad(loss, values)
    moving = torch.tensor(kinds) % 4 != 0
    torch.testing.assert_close(found[moving], wanted[moving], atol=1e-5, rtol=1e-4)


def test_an_update_of_a_context_is_that_of_its_loss(llama, rows):
    """Micro-batches of different sizes add up to the gradient of the one large batch."""
    options = {"method": "cpt", "num_epochs": 1, "max_grad_norm": 0.0}
    whole = tune(llama, rows, batch_size=22, **options)
    parts = tune(llama, rows, batch_size=4, accumulate_steps=6, **options)
    torch.testing.assert_close(
        whole.module.delta_embedding.weight,
        parts.module.delta_embedding.weight,
        atol=1e-6,
        rtol=1e-3,
    )


def test_seq2seq_models_have_no_context(bases, rows):
    with pytest.raises(ConfigError, match="only supports task_type"):
        tune(bases / "bart", rows, method="cpt")


def test_scales_of_a_decoder_are_read_from_it(bases, rows):
    tuned = tune(bases / "bart", rows, method="prefix", tuning_config={"num_virtual_tokens": 3}, **STILL)
    assert key_values(tuned.base.model, [5, 6]).shape[:2] == tuned.prompt().prefix.shape[:2]


def test_short_names_may_be_given_again_to_resume(llama, rows, tmp_path, monkeypatch):
    options = {
        "method": "prefix",
        "lr": 0.1,
        "num_epochs": 2,
        "tuning_config": {"num_virtual_tokens": 3},
    }
    update = Events.update

    def interrupt(self, state, loss):
        update(self, state, loss)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Events, "update", interrupt)
        with pytest.raises(TrainingInterrupted):
            tune(llama, rows, output=tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="has tuning_type 'PREFIX_TUNING', not 'CARTRIDGE'"):
        tune(llama, rows, output=tmp_path / "out", resume=True, method="cartridge")
    tune(llama, rows, output=tmp_path / "out", resume=True, **options)
