"""Where prompts go and what is trained in their place: trained, saved, loaded, generated with."""

import pytest
import torch

from oracles.slow import only
from softprompt.backbone import load_base
from softprompt.errors import ContextOverflowError
from softprompt.evaluation import evaluate
from softprompt.inference import load
from softprompt.peft import PeftModel
from softprompt.training import tune

QUICK = {"num_epochs": 3, "batch_size": 6, "learning_rate": 0.3}
PLACES = {
    "ENCODER": ["ENCODER"],
    "DECODER": ["DECODER"],
    "both": ["ENCODER", "DECODER"],
}


def values_of(tuned):
    return tuned.module.materialize().detach()


@pytest.mark.parametrize("place", only(["both"], PLACES))
def test_a_prompt_for_each_part_of_a_seq2seq_model_is_really_trained(bases, rows, held_out, tmp_path, place):
    config = {"num_virtual_tokens": 3, "output_model_types": PLACES[place]}
    start = values_of(tune(bases / "bart", rows, num_epochs=1, lr=1e-30, tuning_config=config))
    tuned = tune(bases / "bart", rows, held_out, output=tmp_path / "out", tuning_config=config, **QUICK)
    assert tuned.history[-1]["loss"] < tuned.history[0]["loss"]
    moved = (values_of(tuned) - start).abs().sum(dim=1)
    assert moved.shape[0] == 3 * len(PLACES[place])
    assert (moved > 0).all()
    loaded = load(tmp_path / "out")
    assert torch.equal(values_of(loaded), values_of(tuned))
    text = "the film was good"
    assert loaded.classify(text)[0].scores == tuned.classify(text)[0].scores
    options = {"max_new_tokens": 3}
    assert loaded.generate(text, **options)[0].text == tuned.generate(text, **options)[0].text
    kept = tuned.history[tuned.metrics["epoch"] - 1]["validation"]["accuracy"]
    assert evaluate(loaded, held_out).accuracy == pytest.approx(kept)


@pytest.mark.parametrize("place", PLACES)
def test_scores_are_those_of_the_models_own_forward(bases, rows, place):
    config = {"num_virtual_tokens": 3, "output_model_types": PLACES[place]}
    tuned = tune(bases / "bart", rows, num_epochs=1, lr=0.3, tuning_config=config)
    source, _ = tuned.rows.source({"input": "the film was good"})
    target = tuned.label_ids(("yes",))[0]
    with torch.no_grad():
        logits = PeftModel.of(tuned)(input_ids=torch.tensor([source]), labels=torch.tensor([target])).logits[
            0, -len(target) :
        ]
    expected = logits.log_softmax(-1)[range(len(target)), list(target)].sum().item()
    found = tuned.classify("the film was good")[0].scores["yes"]
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_decoder_prompt_counts_against_the_decoders_context(bases):
    long = [{"input": "it was", "output": "film " * 60}] * 4
    config = {"num_virtual_tokens": 5, "output_model_types": ["DECODER"]}
    with pytest.raises(ContextOverflowError, match="5 virtual tokens exceed"):
        tune(bases / "bart", long, tuning_config=config)


@pytest.mark.parametrize(
    ("kind", "rank"),
    only(
        [("low_rank", 2), ("residual", None)], [("low_rank", 2), ("ulpt", 2), ("residual", None), ("superpos", 8)]
    ),
)
def test_what_is_trained_in_the_place_of_rows_is_saved_as_rows(llama, rows, tmp_path, caplog, kind, rank):
    config = {"num_virtual_tokens": 6, "parameterization": kind}
    config |= {} if rank is None else {"parameterization_rank": rank}
    tuned = tune(llama, rows, output=tmp_path / "out", tuning_config=config, num_epochs=3, lr=0.05)
    assert tuned.history[-1]["loss"] < tuned.history[0]["loss"]
    loaded = load(tmp_path / "out")
    torch.testing.assert_close(values_of(loaded), values_of(tuned))
    assert loaded("the film was good") == tuned("the film was good")
    with caplog.at_level("INFO", "softprompt.peft.loading"):
        PeftModel.from_pretrained(load_base(llama).model, tmp_path / "out", is_trainable=True)
    told = f"the virtual tokens of a {kind} prompt are baked: training goes on with the tokens themselves"
    assert told in caplog.messages
