"""Named prompts on one model: add, switch, delete, disable, count."""

from __future__ import annotations

import copy
import re

import peft
import pytest
import torch
import transformers as tf

import softprompt
from oracles.families import CAUSAL, ENCODERS, build, causal, seq2seq, sharing
from oracles.peft_pair import TASKS, base, batch
from oracles.quantised import packed, quantised
from oracles.slow import only
from oracles.weights import weights_hash
from softprompt import PeftModel, PromptTuningConfig, get_peft_model
from softprompt.errors import AdapterError, BackboneError, ConfigError

IDS = torch.tensor([[5, 6, 7, 8]])


def config(length=2, task="CAUSAL_LM", **options):
    return PromptTuningConfig(task_type=task, num_virtual_tokens=length, **options)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return get_peft_model(causal("llama"), config(), "a")


def weight(model, name):
    return model.prompt_encoder[name].embedding.weight


def test_prompts_go_by_name(model):
    model.add_adapter("b", config(3))
    assert model.active_adapter == "a"
    assert model.active_adapters == ["a"]
    assert set(model.peft_config) == {"a", "b"}
    assert weight(model, "b").shape == (3, 32)
    first = model(IDS).logits
    model.set_adapter("b")
    assert model.active_peft_config is model.peft_config["b"]
    second = model(IDS).logits
    assert (first.shape[1], second.shape[1]) == (6, 7)
    model.set_adapter("a")
    assert torch.equal(model(IDS).logits, first)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adding_a_taken_name_is_refused_in_pefts_words(model):
    with pytest.raises(ValueError) as ours:
        model.add_adapter("a", config())
    theirs = peft.get_peft_model(
        causal("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "a"
    )
    assert str(ours.value) == "Adapter with name 'a' already exists."
    with pytest.raises(ValueError, match=re.escape("Adapter x not found.")):
        theirs.set_adapter("x")
    with pytest.raises(ValueError, match=r"^Adapter x not found\."):
        model.set_adapter("x")
    with pytest.raises(AdapterError, match=r"^Adapter x not found\."):
        model.delete_adapter("x")
    with pytest.raises(AdapterError, match=r"^Adapter x not found\."):
        model(IDS, adapter_names=["x"])


def test_an_unknown_name_hints_at_the_nearest(model):
    model.add_adapter("complaints", config())
    with pytest.raises(AdapterError, match="did you mean 'complaints'"):
        model.set_adapter("complaint")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../up",
        "a/b",
        "a\\b",
        "a.b",
        "a b",
        "ä",
        "x" * 65,
        "__base__",
        "a\n",
        "\x00",
        "/abs",
    ],
)
def test_names_that_are_no_names_are_refused(model, name):
    with pytest.raises(AdapterError, match="adapter name must match"):
        model.add_adapter(name, config())
    assert set(model.peft_config) == {"a"}
    with pytest.raises(AdapterError):
        get_peft_model(causal("llama"), config(), name)


@pytest.mark.parametrize("name", ["keys", "items", "values", "forward", "train", "training"])
def test_names_that_torch_keeps_are_refused(model, name):
    with pytest.raises(AdapterError, match="a word torch keeps for itself"):
        model.add_adapter(name, config())
    assert set(model.peft_config) == {"a"}


@pytest.mark.parametrize("name", ["weight", "default", "0", "-", "_", "classifier", "x" * 64])
def test_any_other_name_works(model, name):
    model.add_adapter(name, config())
    model.set_adapter(name)
    assert model(IDS).logits.shape[1] == 6


def test_a_failed_addition_leaves_nothing(model):
    before = [parameter.shape for parameter in model.parameters()]
    for bad in (
        config(modules_to_save=["no_such_module"]),
        config(task="SEQ_CLS"),
        config(token_dim=7),
        PromptTuningConfig(task_type="CAUSAL_LM"),
    ):
        with pytest.raises(ConfigError):
            model.add_adapter("b", bad)
        assert set(model.peft_config) == {"a"}
        assert list(model.prompt_encoder) == ["a"]
        assert [parameter.shape for parameter in model.parameters()] == before
    model.add_adapter("b", config())


def test_a_failed_attachment_leaves_the_base_alone():
    base_model = causal("llama")
    for bad in (config(modules_to_save=["no_such_module"]), config(token_dim=7)):
        with pytest.raises(ConfigError):
            get_peft_model(base_model, bad)
        assert not base_model.get_input_embeddings()._forward_hooks
        assert not base_model.get_input_embeddings()._forward_pre_hooks
        assert all(parameter.requires_grad for parameter in base_model.parameters())


def test_all_prompts_share_the_task(model):
    with pytest.raises(ConfigError, match="share its task_type CAUSAL_LM, got SEQ_CLS"):
        model.add_adapter("b", config(task="SEQ_CLS"))
    model.add_adapter("c", PromptTuningConfig(num_virtual_tokens=2))
    assert model.peft_config["c"].task_type == "CAUSAL_LM"


def test_deleting(model):
    model.add_adapter("b", config(3))
    model.add_adapter("c", config(4))
    model.delete_adapter("b")
    assert list(model.peft_config) == ["a", "c"]
    assert model.active_adapter == "a"
    model.delete_adapter("a")
    assert model.active_adapter == "c"
    assert weight(model, "c").requires_grad
    assert model(IDS).logits.shape[1] == 8
    model.delete_adapter("c")
    assert model.active_adapters == []
    assert model.peft_config == {}
    assert not model.has_active_enabled_adapter
    with pytest.raises(AdapterError, match="no prompt is attached, the last one was deleted; add_adapter"):
        model(IDS)
    model.add_adapter("a", config())
    model.set_adapter("a")


@pytest.mark.parametrize("task", TASKS)
def test_disabled_it_is_the_base_in_every_task(task):
    torch.manual_seed(0)
    inputs, untouched = batch(task), base(task)
    model = get_peft_model(base(task), config(task=task)).eval()
    expected = untouched(**inputs)
    with pytest.raises(KeyError), model.disable_adapter():
        assert torch.equal(model(**inputs)[0], expected[0])
        raise KeyError
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        assert torch.equal(model(**inputs)[0], expected[0])
        if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
            ids = {"input_ids": inputs["input_ids"], "max_new_tokens": 4, "do_sample": False}
            assert model.generate(**ids).tolist() == untouched.generate(**ids).tolist()
    changed = model(**inputs)[0]
    assert changed.shape != expected[0].shape or not torch.equal(changed, expected[0])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_counts_in_pefts_words(capsys):
    def counted(library):
        base_model = build(tf.AutoModelForCausalLM, CAUSAL["llama"](), tie_word_embeddings=False)
        prompted = library.get_peft_model(
            base_model, library.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        )
        prompted.print_trainable_parameters()
        return capsys.readouterr().out, prompted

    import softprompt

    (ours, prompted), (theirs, _) = counted(softprompt), counted(peft)
    assert ours == theirs
    total = sum(p.numel() for p in prompted.get_base_model().parameters()) + 64
    assert ours == f"trainable params: 64 || all params: {total:,} || trainable%: {6400 / total:.4f}\n"
    assert prompted.get_nb_trainable_parameters() == (64, total)
    assert prompted.num_parameters() == total
    assert prompted.num_parameters(only_trainable=True) == 64
    assert prompted.num_parameters(exclude_embeddings=True) == total - 64 * 32


def test_heads_are_counted(capsys):
    prompted = get_peft_model(base("SEQ_CLS"), config(task="SEQ_CLS"))
    assert prompted.num_parameters(only_trainable=True) == 2 * 32 + 3 * 32 + 3


@pytest.mark.parametrize("task", TASKS)
def test_one_class_per_task(task):
    prompted = get_peft_model(base(task), config(task=task))
    assert type(prompted) is PeftModel.classes[prompted.task_type]
    assert isinstance(prompted, PeftModel)
    assert type(prompted).__name__ in {name for name in dir(peft) if name.startswith("PeftModelFor")}


def test_a_class_refuses_another_task():
    with pytest.raises(ConfigError, match="class takes task_type CAUSAL_LM, got SEQ_CLS"):
        PeftModel.classes["CAUSAL_LM"](causal("llama"), config(task="SEQ_CLS"))


def test_the_task_is_read_from_the_model_or_asked_for():
    loader, make, changes = TASKS["TOKEN_CLS"]
    inferred = get_peft_model(build(loader, make(), **changes), PromptTuningConfig(num_virtual_tokens=2))
    assert inferred.task_type == "TOKEN_CLS"
    masked = build(tf.AutoModelForMaskedLM, ENCODERS["bert"]())
    with pytest.raises(ConfigError, match="set task_type to one of"):
        get_peft_model(masked, PromptTuningConfig(num_virtual_tokens=2))


def test_what_is_no_model_or_config_is_refused():
    with pytest.raises(ConfigError, match=r"expected a model, a torch\.nn\.Module, got a str"):
        get_peft_model("gpt2", config())
    with pytest.raises(ConfigError, match=r"Linear has no torch\.nn\.Embedding"):
        get_peft_model(torch.nn.Linear(2, 2), config())
    with pytest.raises(ConfigError, match="expected a PromptTuningConfig"):
        get_peft_model(causal("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))


METHODS = {
    "prompt": PromptTuningConfig(num_virtual_tokens=4),
    "text": PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB"),
    "multitask": softprompt.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2),
    "p-tuning": softprompt.PromptEncoderConfig(num_virtual_tokens=4),
    "prefix": softprompt.PrefixTuningConfig(num_virtual_tokens=4),
    "cartridge": softprompt.CartridgeConfig(num_virtual_tokens=4),
    "unseeing": PromptTuningConfig(num_virtual_tokens=4, prompt_sees_input=False),
}


@pytest.mark.parametrize("method", only(["text", "prefix", "unseeing"], METHODS))
@pytest.mark.parametrize("family", only(["llama", "t5"], ["llama", "bert", "t5", "gemma4"]))
def test_attaching_and_loading_run_no_pass_of_the_base(family, method, tmp_path):
    if method == "unseeing" and family not in ("bert", "t5"):
        pytest.skip("it would be ignored there")
    make = {"bert": lambda: build(tf.AutoModelForTokenClassification, ENCODERS["bert"]()),
            "t5": lambda: seq2seq("t5"), "gemma4": lambda: sharing("gemma4")}  # fmt: skip
    base = make.get(family, lambda: causal(family))()
    before = weights_hash(base)
    calls = []
    for module in base.modules():
        if not isinstance(module, torch.nn.Embedding):
            module.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
    model = get_peft_model(base, METHODS[method])
    model.add_adapter("other", METHODS[method])
    model.save_pretrained(tmp_path)
    model.detach()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    loaded.load_adapter(tmp_path / "other", "another")
    loaded.detach()
    assert calls == [] and weights_hash(base) == before


def test_a_packing_base_trains_behind_a_prefix():
    base = quantised(causal("llama"))
    model = get_peft_model(base, softprompt.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with torch.no_grad():
        model.eval()(IDS)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert packed(base) == 0


class Recurrent(torch.nn.Module):
    """A language model of its own, with a configuration of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = Sizes(vocab_size=50, hidden_size=16, model_type="own")
        self.device = "cpu"
        self.embedding, self.head = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 50)
        self.mix = torch.nn.GRU(16, 16, batch_first=True)
        self.prepare_inputs_for_generation = None

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, labels=None, **options):
        states = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        logits = self.head(self.mix(states)[0])
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return tf.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class Sizes(dict):
    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)


def test_any_module_may_be_the_base(tmp_path):
    base = Recurrent()
    model = get_peft_model(base, config(), "a")
    sizes = {"num_layers": 1, "token_dim": 16, "num_attention_heads": 1}
    theirs = peft.get_peft_model(
        Recurrent(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, **sizes)
    )
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(weight(model, "a"))
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    for each in (model.train(), theirs.train()):
        each(**inputs).loss.backward()
    torch.testing.assert_close(weight(model, "a").grad, theirs.prompt_encoder["default"].embedding.weight.grad)
    assert base.training and not model.eval().get_base_model().training and model.get_base_model() is base
    assert set(dict(base.named_parameters())) == {
        n.removeprefix("base_model.") for n in model.state_dict() if n.startswith("base_model.")
    }
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**inputs).logits, model(**inputs).logits) and copied.get_base_model() is not base
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Recurrent(), tmp_path / "a").eval()
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert model.detach() is base and not base.embedding._forward_hooks
    prefix = softprompt.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, **sizes)
    with pytest.raises(BackboneError, match="cannot be run behind a prefix"):
        get_peft_model(base, prefix)(**inputs)


def test_task_ids_are_refused(model):
    with pytest.raises(ConfigError, match="task_ids"):
        model(IDS, task_ids=torch.tensor([0]))
    with pytest.raises(ConfigError, match="task_ids"):
        model.generate(IDS, task_ids=torch.tensor([0]))
    model(IDS, task_ids=None)


def test_inputs_that_do_not_fit_are_explained(model):
    with pytest.raises(ConfigError, match="exactly one of input_ids and inputs_embeds"):
        model(attention_mask=torch.ones(1, 4))
    with pytest.raises(ConfigError, match="exactly one of"):
        model(IDS, inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(ConfigError, match="do not count the virtual tokens"):
        model(IDS, attention_mask=torch.ones(1, 6))


def test_the_users_config_is_not_changed():
    given = config()
    before = given.to_dict()
    get_peft_model(causal("llama"), given)
    assert given.to_dict() == before


def test_the_config_knows_the_base(model):
    values = model.peft_config["a"].to_dict()
    assert (values["token_dim"], values["num_layers"], values["num_attention_heads"]) == (32, 2, 4)
    assert values["num_transformer_submodules"] == 1
    with pytest.raises(ConfigError, match="num_transformer_submodules=2"):
        model.add_adapter("b", config(num_transformer_submodules=2))


def test_attributes_of_the_base_are_there(model):
    assert model.config is model.base_model.config
    assert model.get_base_model() is model.base_model
    assert model.device == model.base_model.device
    with pytest.raises(AttributeError):
        _ = model.no_such_attribute


def test_a_generator_seeds_one_prompt(model):
    for name in ("b", "c"):
        model.add_adapter(name, config(), generator=torch.Generator().manual_seed(3))
    assert torch.equal(weight(model, "b"), weight(model, "c"))


@pytest.mark.parametrize("init", ["RANDOM", "RANDOM_SCALED", "SAMPLE_VOCAB"])
def test_the_global_seed_decides_without_one(init):
    rows = []
    for seed in (0, 0, 1):
        base_model = causal("llama")
        torch.manual_seed(seed)
        rows.append(weight(get_peft_model(base_model, config(prompt_tuning_init=init), "a"), "a"))
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_the_scaled_init_has_the_scale_of_the_base():
    prompted = get_peft_model(causal("llama"), config(50, prompt_tuning_init="RANDOM_SCALED"), "a")
    assert weight(prompted, "a").std().item() == pytest.approx(prompted.facts.embedding_rms, rel=0.1)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_ids_that_are_no_tokens_never_mean_prompt_rows(task):
    prompted = get_peft_model(base(task), config(task=task))
    ids = torch.tensor([[5, 64]])
    with pytest.raises(ConfigError, match="input_ids hold 64, but the base has 64 tokens"):
        prompted(input_ids=ids, **({"labels": ids - 5} if task == "SEQ_2_SEQ_LM" else {}))
    with pytest.raises(ConfigError, match="input_ids hold 64"):
        prompted.generate(input_ids=ids, max_new_tokens=2)


def test_a_resized_vocabulary_is_refused_until_attached_again(model):
    model.resize_token_embeddings(80)
    with pytest.raises(ConfigError, match="had 64 rows when the prompts were attached, now it has 80"):
        model(IDS)
    with pytest.raises(ConfigError, match="resize it first"):
        model.generate(IDS, max_new_tokens=2)
    back = get_peft_model(model.detach(), config())
    assert back(torch.tensor([[5, 79]])).logits.shape == (1, 4, 80)
