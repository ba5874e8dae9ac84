"""Chats from a file to answers: one rendering in training, evaluation, Python, the command line and the server."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

import softprompt
from oracles import families
from oracles.real_model import smollm2
from oracles.serving import app_over, running
from oracles.slow import only
from oracles.tokenizers import chat_bpe
from softprompt.backbone import input_embedding, load_base
from softprompt.cli.main import run
from softprompt.data import ALPACA, RowTokenizer, Verbalizer, read_records
from softprompt.engine import ForestEngine
from softprompt.errors import ConfigError, TemplateError
from softprompt.generation.answer import AnswerRules
from softprompt.generation.labels import target_likelihood
from softprompt.prompts import Prompt
from softprompt.server.chat import chat_input
from softprompt.server.served import PlainText, Served

QUESTIONS = ["is it good or bad", "the parcel is late", "thank you", "label: text"]
TALKS = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"great service {number}"},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": f"late {number}"},
        ]
    }
    for number, question in enumerate(QUESTIONS)
]
OPENING = TALKS[0]["messages"][:-1]
QUICK = {
    "num_epochs": 1,
    "batch_size": 3,
    "tuning_config": {"num_virtual_tokens": 3},
    "silence_progress_bars": True,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a tiny chat model."""
    folder = tmp_path_factory.mktemp("chat-base")
    families.widened(families.causal("llama", vocab_size=330, max_position_embeddings=512)).save_pretrained(folder)
    chat_bpe().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    path.write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    return str(path)


@pytest.fixture(scope="module", params=only(["chat_system"], ["prefix", "chat_system"]))
def prompt(request, base, talks, tmp_path_factory):
    """Folder of a prompt that was trained on every answer, from the command line."""
    output = tmp_path_factory.mktemp("prompts") / request.param
    words = ["--train-data", talks, "--validation-data", talks, "--base-model", base, "--train-on", "all"]
    words += [
        "--placement",
        request.param,
        "--num-virtual-tokens",
        "3",
        "--num-epochs",
        "2",
        "--batch-size",
        "3",
        "--max-target-length",
        "16",
    ]
    assert run(["tune", *words, "--output", str(output), "--quiet"]) == 0
    return output


def plain_loss(base, virtual, records, placement="prefix"):
    """Return the mean loss of plain transformers on every answer, labels of -100 elsewhere, behind the prompt."""
    tokenizer, model, at, losses = base.tokenizer, base.model, 0, []
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for record in records:
        messages = record["messages"]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        labels = [-100] * len(ids)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                opening = tokenizer.apply_chat_template(
                    messages[:number], add_generation_prompt=True, return_dict=False
                )
                stop = ids.index(end, len(opening)) + 1
                labels[len(opening) : stop] = ids[len(opening) : stop]
        if placement == "chat_system":
            at = len(tokenizer("<|im_start|>system\n", add_special_tokens=False)["input_ids"])
        embeds = input_embedding(model)(torch.tensor(ids))
        whole = torch.cat([embeds[:at], virtual, embeds[at:]])
        wanted = torch.tensor([*labels[:at], *[-100] * len(virtual), *labels[at:]])
        with torch.no_grad():
            logits = model(inputs_embeds=whole[None]).logits[0]
        losses.append(F.cross_entropy(logits[:-1], wanted[1:], reduction="none")[wanted[1:] != -100])
    return float(torch.cat(losses).mean())


def test_validation_is_the_loss_of_transformers_on_every_answer(prompt):
    tuned = softprompt.load(prompt)
    assert tuned.manifest.chat and tuned.manifest.settings["train_on"] == "all"
    expected = plain_loss(tuned.base, tuned.prompt().input, TALKS, prompt.name)
    kept = next(point for point in tuned.history if point["epoch"] == tuned.metrics["epoch"])
    assert kept["validation"]["loss"] == pytest.approx(expected, rel=1e-4)


def test_ids_are_the_same_along_all_paths(prompt, capsys):
    tuned = softprompt.load(prompt)
    (record,) = read_records(TALKS[:1])
    (trained,), _ = tuned.rows.tokenize([record])
    served = Served("talks", "1", PlainText(tuned.base, seq2seq=False), tuned)
    asked = [chat_input(served, OPENING), served.of_fields({"messages": OPENING})]
    assert {(each.ids, each.at) for each in asked} == {(trained.source, trained.at)}
    for request in (OPENING, [OPENING], {"messages": OPENING}, [{"messages": OPENING}]):
        assert tuned.sources(request)[0] == [trained.source]
    text = [{"role": "user", "content": "thank you"}]
    assert tuned.sources("thank you") == tuned.sources(text) == tuned.sources({"input": "thank you"})
    assert served.of_fields("thank you").ids == chat_input(served, text).ids == tuned.sources(text)[0][0]
    assert tuned(text) == tuned("thank you") == tuned.generate(text, max_new_tokens=16)[0].text
    assert tuned(["thank you", text]) == [tuned(text)] * 2
    assert "".join(tuned.stream(text, max_new_tokens=16)) == tuned(text)
    words = ["generate", str(prompt), "--text", "thank you", "--max-new-tokens", "16", "--json"]
    assert run(words) == 0
    assert json.loads(capsys.readouterr().out)["text"] == tuned(text)


def test_the_server_answers_messages_as_python_does(prompt):
    tuned = softprompt.load(prompt)
    with running(app_over(tuned.base, prompt.parent)) as server, server.openai() as ai:
        found = ai.chat.completions.create(model=prompt.name, messages=OPENING, max_tokens=5, temperature=0)
        same = ai.completions.create(model=prompt.name, prompt="thank you", max_tokens=5, temperature=0)
    expected = tuned.generate([OPENING, "thank you"], max_new_tokens=5)
    assert [found.choices[0].message.content, same.choices[0].text] == [each.text for each in expected]


def test_evaluation_renders_chats_and_plain_records_alike(prompt):
    tuned = softprompt.load(prompt)
    report = softprompt.evaluate(tuned, TALKS)
    assert report.task == "generation" and report.rows == len(TALKS)
    answers = tuned.generate([talk["messages"][:-1] for talk in TALKS], max_new_tokens=16)
    own = [dict(talk, messages=[*talk["messages"][:-1], {"role": "assistant", "content": answer.text or "-"}])
           for talk, answer in zip(TALKS, answers, strict=True)]  # fmt: skip
    if all(answer.text.strip() for answer in answers):
        assert softprompt.evaluate(tuned, own).exact_match == 1
    plain = softprompt.evaluate(tuned, [{"input": "thank you", "output": "late"}])
    turns = [{"role": "user", "content": "thank you"}, {"role": "assistant", "content": "late"}]
    assert plain.perplexity == softprompt.evaluate(tuned, [{"messages": turns}]).perplexity


def test_the_records_of_a_file_are_asked_without_their_last_answer(prompt, talks, capsys):
    tuned = softprompt.load(prompt)
    asked = [talk["messages"][:-1] for talk in TALKS]
    words = ["--data", talks, "--json", "--quiet"]
    assert run(["generate", str(prompt), *words, "--max-new-tokens", "3"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    assert [each["text"] for each in found] == [each.text for each in tuned.generate(asked, max_new_tokens=3)]
    assert run(["classify", str(prompt), *words, "--label", "late", "--label", "service"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    expected = tuned.classify(asked, labels=["late", "service"])
    assert [each["scores"] for each in found] == [each.scores for each in expected]


def test_card_and_info_name_the_chat_template(prompt, capsys):
    card = (prompt / "README.md").read_text()
    assert "Inputs are chats, rendered with the base model's chat template" in card
    assert "rendered with this template" not in card
    # PEFT refuses a prompt in the system turn, so its card shows no code for it.
    assert ("tokenizer.apply_chat_template(" in card) == (prompt.name == "prefix")
    assert run(["info", str(prompt), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["template"] == "the base's chat template"


def test_answers_end_with_their_turn_even_where_the_tokenizer_ends_texts_otherwise(base):
    loaded = load_base(base)
    loaded.tokenizer.eos_token = "</s>"
    ends = loaded.tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert AnswerRules.of(loaded).eos_ids >= {*ends}
    loaded.tokenizer.chat_template = "{{ raise_exception('not these') }}"
    assert ends[1] not in AnswerRules.of(loaded).eos_ids


def test_labels_of_chats_are_scored(base):
    data = [
        {"prompt": f"{word} service {number}", "completion": word}
        for number in range(4)
        for word in ("good", "bad")
    ]
    tuned = softprompt.tune(base, data, data, **QUICK)
    assert tuned.labels == ("bad", "good") and tuned.manifest.chat
    scores = tuned.classify([{"role": "user", "content": "good service 1"}])[0]
    assert scores == tuned.classify("good service 1")[0]
    assert softprompt.evaluate(tuned, data).accuracy is not None


@pytest.mark.parametrize("has_template", [True, False])
def test_instructions_get_the_bases_template_or_alpacas(base, has_template, caplog):
    loaded = load_base(base)
    if not has_template:
        loaded.tokenizer.chat_template = None
    data = [
        {"instruction": f"name {number}", "input": "", "output": f"late {number}", "id": 1} for number in range(3)
    ]
    data.append({"instruction": "sum up", "input": "a text", "output": "bad"})
    with caplog.at_level("INFO", "softprompt"):
        tuned = softprompt.tune(loaded, data, **QUICK)
    assert tuned.manifest.chat == has_template
    (source,), _ = tuned.sources({"instruction": "sum up", "input": "a text"})
    text = tuned.tokenizer.decode(source)
    if has_template:
        assert "user\nsum up\n\na text<|im_end|>" in text and "chat template renders" in caplog.text
    else:
        assert tuned.manifest.template == ALPACA
        assert text.endswith("### Instruction:\nsum up\n\n### Input:\na text\n\n### Response:\n")
        assert "paired with" not in tuned.tokenizer.decode(tuned.sources("sum up")[0][0])
        assert "the base has no chat template, so the records get the plain template" in caplog.text
    assert "leaves out the columns id" in caplog.text
    assert softprompt.evaluate(tuned, data).rows == 4


def test_what_is_chosen_is_said(base, talks, caplog):
    with caplog.at_level("INFO", "softprompt"):
        softprompt.tune(base, talks, **QUICK)
        assert "the last answer of each chat is trained; train_on all trains all 8" in caplog.text
        caplog.clear()
        plain = [{"text": f"{number} a", "labels": "b", "note": "x", "id": 3} for number in range(4)]
        softprompt.tune(base, plain, verbalizer="{{text}} :", task="generation", **QUICK)
    assert (
        caplog.text.count("the base has a chat template, which the plain template '{{text}} :' does not use") == 1
    )
    assert "the template leaves out the columns note, id\n" in caplog.text


def test_settings_that_would_be_ignored_are_refused(base, talks, tmp_path):
    plain = [{"input": "a", "output": "b"}] * 4
    with pytest.raises(ConfigError, match="train_on would be ignored: it is for chats"):
        softprompt.tune(base, plain, train_on="last", **QUICK)
    with pytest.raises(ConfigError, match="verbalizer would be ignored: the base's chat template renders chats"):
        softprompt.tune(base, talks, verbalizer="{{messages}}", **QUICK)
    with pytest.raises(ConfigError, match="train_on all trains every answer"):
        softprompt.tune(base, talks, train_on="all", task="classification", **QUICK)
    with pytest.raises(ConfigError, match="train_on all would train more than the labels"):
        softprompt.tune(base, talks, train_on="all", **QUICK | {"tuning_config": {}}, method="cpt")
    with pytest.raises(ConfigError, match="the data is chats and this base model has no chat template"):
        softprompt.tune("demo", talks, **QUICK)
    instructions = [{"instruction": "a", "output": "b"}] * 4
    with pytest.raises(ConfigError, match="train_on would be ignored: this base model has no chat template"):
        softprompt.tune("demo", instructions, train_on="last", task="generation", **QUICK)
    untrained = softprompt.tune(base, plain, task="generation", **QUICK)
    with pytest.raises(
        TemplateError, match="this prompt was not trained on chats; pass a text, or the fields input"
    ):
        untrained.generate(OPENING)


def test_a_task_of_several_may_be_chats(base, talks, tmp_path):
    plain = [{"input": f"is it {word}", "output": word} for word in ("good", "bad", "good", "bad")]
    softprompt.tune(
        base, {"talks": talks, "words": plain}, output=tmp_path / "prompt", method="multitask",
        distillation_weight=0.0, **QUICK,
    )  # fmt: skip
    again = softprompt.load(tmp_path / "prompt")
    assert [again.of_task(name).manifest.chat for name in ("talks", "words")] == [True, False]
    assert "<|im_start|>" in again.tokenizer.decode(again.of_task("talks").sources("thank you")[0][0])
    assert again.of_task("words").sources("is it")[0] == [tuple(again.tokenizer("is it")["input_ids"])]


@pytest.mark.slow
def test_the_loss_of_a_real_chat_model():
    base = load_base(str(smollm2()))
    rows = RowTokenizer(
        base.tokenizer,
        Verbalizer("{{input}}"),
        max_source_length=256,
        max_target_length=64,
        seq2seq=False,
        chats="all",
    )
    found, _ = rows.tokenize(read_records(TALKS[:2]))
    assert {row.target[-1] for row in found} == {base.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    virtual = input_embedding(base.model).weight[100:104].detach().clone()
    likelihood = target_likelihood(ForestEngine(base, trusted=True), found, Prompt(virtual))
    assert likelihood.loss == pytest.approx(plain_loss(base, virtual, TALKS[:2]), rel=1e-4)
