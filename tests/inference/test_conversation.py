"""A conversation: the server's rendering of a chat, its history, and what is left out of it once it is too long."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.serving import write_prompt
from softprompt.backbone import Base, load_base
from softprompt.errors import ConfigError, ContextOverflowError
from softprompt.generation import Decoder, GenerationOptions, Request
from softprompt.inference import Conversation, load_many
from softprompt.server.chat import chat_input
from softprompt.server.served import PlainText, Served

CHAT = (
    "{% for m in messages %}{% if m['content'] == 'refused' %}{{ raise_exception('not this') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FEW = GenerationOptions(max_new_tokens=4, min_new_tokens=4)
PLACEMENTS = ["prefix", "suffix", "chat_system"]


@pytest.fixture(scope="module")
def plain_base():
    found = load_base("demo")
    found.model.requires_grad_(False)
    return found


@pytest.fixture(scope="module")
def base(plain_base):
    tokenizer = copy.deepcopy(plain_base.tokenizer)
    tokenizer.chat_template = CHAT
    return Base(plain_base.model, tokenizer, plain_base.name)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("prompts")
    for seed, name in enumerate("ab"):
        write_prompt(folder / name, base, seed=seed, length=40, task="generation", labels=None)
    found = load_many([folder / "a", folder / "b"], base.model, tokenizer=base.tokenizer)
    return {"base": None, "a": found[0], "b": found[1]}


@pytest.fixture
def talk(base, prompts):
    with Conversation(base, prompts, FEW, system="Be brief.") as found:
        yield found


def said(talk, text, *names):
    return ["".join(answer) for answer in talk.ask(text, names)]


def test_answers_are_those_of_the_same_tokens_alone(talk, base, prompts):
    for text in ("Hello", "And you?"):
        found = said(talk, text, "base", "a")
        alone = [
            Request.of(talk.input_of(n), prompts[n] and prompts[n].prompt(), options=FEW) for n in ("base", "a")
        ]
        assert found == [end.text for (end,) in Decoder(base).run(alone)]
    assert found[0] != found[1]


def test_a_voice_sees_its_own_earlier_answers_or_those_of_who_was_asked(talk, base):
    (a,) = said(talk, "one", "a")
    of_base, of_a = talk.ask("two", ["base", "a"])
    next(iter(of_base))
    list(of_a)
    said(talk, "three", "b")
    shown = {name: base.tokenizer.decode(talk.input_of(name).ids) for name in ("base", "a", "b")}
    assert all(text.startswith("<|system|>Be brief.\n<|user|>one\n<|assistant|>" + a) for text in shown.values())
    assert shown["a"] != shown["base"] == shown["b"]
    assert all(text.endswith("<|user|>three\n<|assistant|>") for text in shown.values())
    talk.reset()
    talk.system = None
    said(talk, "four", "a")
    assert base.tokenizer.decode(talk.input_of("a").ids) == "<|user|>four\n<|assistant|>"


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_chat_is_rendered_as_the_server_does(tmp_path, base, placement):
    write_prompt(tmp_path / "own", base, task="generation", labels=None)
    own = tmp_path / "own" / "adapter_config.json"
    own.write_text(own.read_text().replace("{", f'{{"placement": "{placement}", ', 1))
    (tuned,) = load_many([tmp_path / "own"], base.model, tokenizer=base.tokenizer)
    served = Served("own", "1", PlainText(base, seq2seq=False), tuned)
    with Conversation(base, {"base": None, "own": tuned}, FEW) as talk:
        first = said(talk, "Tell <|user|> a", "own")
        said(talk, "b", "own")
        messages = [("user", "Tell <|user|> a"), ("assistant", first[0]), ("user", "b")]
        expected = chat_input(served, [{"role": role, "content": text} for role, text in messages])
        found = talk.input_of("own")
        assert (found.ids, found.at) == (expected.ids, expected.at)
        if placement == "chat_system":
            talk.system = "Be brief."
            with pytest.raises(ConfigError, match="stands in the system turn"):
                talk.ask("c", ["base", "own"])
            talk.system = None
            assert talk.input_of("own").ids == found.ids, "what was begun for the base is left"


def test_the_oldest_turns_are_left_out_where_the_context_ends(talk, base):
    left = []
    for number in range(12):
        (answer,) = talk.ask(f"{number} " + "word " * 60, ["a"])
        list(answer)
        left.append(answer.left_out)
        text = base.tokenizer.decode(talk.input_of("a").ids)
        assert text.startswith(f"<|system|>Be brief.\n<|user|>{answer.left_out} word")
        assert text.count("<|user|>") == number + 1 - answer.left_out
    assert left[0] == 0
    assert left == sorted(left)
    assert left[-1] > 0


def test_a_turn_that_cannot_be_answered_leaves_the_history_as_it_was(talk):
    said(talk, "Hello", "a")
    before = talk.input_of("a").ids
    with pytest.raises(ContextOverflowError):
        talk.ask("word " * 2000, ["base", "a"])
    with pytest.raises(ConfigError, match="refuses these messages: not this"):
        talk.ask("refused", ["a"])
    assert talk.input_of("a").ids == before
    said(talk, "Again", "a")


def test_an_answer_that_is_left_keeps_what_was_said(talk, base):
    (answer,) = talk.ask("Hello", ["base"])
    piece = next(iter(answer))
    said(talk, "And?", "base")
    assert f"<|assistant|>{piece}\n<|user|>And?" in base.tokenizer.decode(talk.input_of("base").ids)


@settings(max_examples=15)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=3))
def test_without_a_template_turns_are_lines(plain_base, texts):
    with Conversation(plain_base, {"base": None}, FEW, system="Short.") as talk:
        lines = ["System: Short.\n"]
        for text in texts:
            lines.append(f"User: {text}\n")
            (answer,) = said(talk, text, "base")
            found = talk.input_of("base").ids
            expected = plain_base.tokenizer("".join([*lines, "Assistant:"]), split_special_tokens=True)
            assert list(found) == expected["input_ids"]
            lines.append(f"Assistant: {answer}\n")
