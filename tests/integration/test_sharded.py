"""A base spread over two processes gives the log-probabilities, gradients, prompts and answers of a whole one."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import final

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from oracles import families
from oracles.processes import run_together
from oracles.ranks import run_ranks
from oracles.tiny_bases import write_base
from oracles.weights import weights_hash
from softprompt import PrefixTuningConfig, PromptTuningConfig, get_peft_model, load, tune
from softprompt.backbone import Base, load_base, own_part
from softprompt.engine import EngineRow, build_engine
from softprompt.errors import BackboneError, ConfigError
from softprompt.prompts import Prompt

WORDS = ("good", "bad", "late", "early", "so bad that all of us left", "fine")
ALL = [{"input": f"It is {word}.", "output": word.split()[-1]} for word in WORDS * 2]
RECORDS = ALL[:9], ALL[9:]
HOW = {"verbalizer": "{{input}} Label: ", "num_epochs": 2, "batch_size": 4, "learning_rate": 0.05}
HOW |= {"tuning_config": {"num_virtual_tokens": 3}, "silence_progress_bars": True}
PROMPTS = ("virtual tokens", "keys and values")
OTHERS = ("t5", "bart", "gpt2", "bloom", "mixtral", "gemma2", "qwen2")


def scored(base, kind="virtual tokens", engine="auto", *, recomputed=False):
    """The engine's name, the log-probabilities of three rows, and the gradient of the prompt two of them share."""
    drawn = torch.Generator().manual_seed(1)
    if kind == "virtual tokens":
        values = torch.randn(5, base.facts.token_dim, generator=drawn) * base.facts.embedding_rms
        prompt = Prompt(values.requires_grad_())
    else:
        shape = base.key_value_shape
        values = torch.randn(shape.layers, 2, shape.heads, 5, shape.width, generator=drawn)
        prompt = Prompt(prefix=values.requires_grad_())
    texts = ((5, 50, 60, 7), (7, 9)), ((5, 50), (7, 7, 3))
    rows = [*(EngineRow(*each, prompt) for each in texts), EngineRow((5, 6), (9,))]
    runs = build_engine(base, engine)
    if recomputed:
        base.model.gradient_checkpointing_enable()
        base.model.train()
    values_of_rows = runs.target_log_probs(rows).values
    values_of_rows.sum().backward()
    base.model.eval()
    return runs.name, values_of_rows.detach(), values.grad


def compared(folder, kinds, shard, *, oracle="plain", recomputed=False):
    """What a whole base, run by the oracle, and a sharded one say of themselves, and of rows."""
    whole, base = load_base(folder), load_base(folder, shard=shard)
    before = weights_hash(base.model)
    found = {kind: (scored(whole, kind, oracle), scored(base, kind, recomputed=recomputed)) for kind in kinds}
    found["facts"] = whole.facts, base.facts
    found["fingerprint"] = whole.fingerprint.to_dict(), base.fingerprint.to_dict()
    found["weights"] = weights_hash(whole.model), before, weights_hash(base.model)
    count = sum(each.numel() for each in base.model.parameters())
    found["held"] = base.shard, sum(own_part(each).numel() for each in base.model.parameters()) / count
    return found


def said_of(action):
    """What an action is refused with."""
    try:
        action()
    except (BackboneError, ConfigError) as error:
        return str(error)
    return "nothing"


def work(bases, output):
    """What the tests of FSDP2 look at, in one go."""
    llama = bases["llama"]
    found = {
        name: compared(folder, PROMPTS if name == "llama" else PROMPTS[:1], "fsdp")
        for name, folder in bases.items()
    }
    found["table"] = said_of(lambda: Base(sharded_everywhere(llama)).facts)
    found["tuned"] = used(tune(llama, *RECORDS, output=output, shard="fsdp", **HOW))
    return found


def used(prompt):
    """A prompt's virtual tokens, and what it answers."""
    answers = [each.text for each in prompt.generate(["It", "So"], max_new_tokens=4)]
    scored = prompt.classify(["It is late.", "So"], labels=["good", "late"])
    return prompt.prompt().input.detach(), answers, [each.label for each in scored]


def further_work(bases, others, odd):
    """What the slower tests look at: tensor parallelism, layers that run again, other architectures."""
    llama = bases["llama"]
    found = {name: compared(folder, PROMPTS, "fsdp", oracle="auto") for name, folder in others.items()}
    found |= {f"{shard} again": compared(llama, PROMPTS[:1], shard, recomputed=True) for shard in ("fsdp", "tp")}
    found["tp"] = compared(llama, PROMPTS[:1], "tp")
    split = load_base(llama, shard="tp")
    found["wire"] = sent(load_base(llama, shard="fsdp")), sent(split)
    found["refused"] = {
        "prefix": said_of(lambda: get_peft_model(split.model, PrefixTuningConfig(num_virtual_tokens=2))),
        "heads": said_of(lambda: load_base(odd, shard="tp")),
        "plan": said_of(lambda: load_base(bases["gpt_neo"], shard="tp")),
        "gguf": said_of(lambda: load_base(f"{odd}/model.gguf", shard="fsdp")),
        "in memory": said_of(lambda: load_base(load_base(llama).model, shard="tp")),
    }
    found["prompted"] = [prompted(load_base(llama, shard=shard)) for shard in (None, "fsdp", "tp")]
    found["tuned by expand"] = used(tune(bases["gpt_neo"], *RECORDS, shard="fsdp", **HOW))
    found["tuned"] = used(tune(llama, *RECORDS, shard="tp", **HOW))
    found["memory"] = [tune(llama, *RECORDS, shard=shard, dry_run=True, **HOW).memory for shard in (None, "fsdp")]
    return found


def prompted(base):
    """Logits, gradient and greedy tokens of PEFT's interface."""
    torch.manual_seed(0)
    model = get_peft_model(base.model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    ids = torch.arange(5, 19).view(2, 7)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    (gradient,) = (each.grad for each in model.parameters() if each.requires_grad)
    return output.logits.detach(), gradient, model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)


@final
class Sent(TorchDispatchMode):
    """Counts the numbers that leave collectives."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if "allgather_base" in str(func) or "all_reduce.default" in str(func):
            self.numbers += args[0].numel()
        return output


def sent(base):
    """Numbers gathered or summed in a pass of seven tokens and its backward, and those of the layers' weights."""
    for _ in range(2):  # the first pass also prepares
        states = base.embedding(torch.arange(5, 12).unsqueeze(0)).requires_grad_()
        with Sent() as count:
            base.model(inputs_embeds=states, use_cache=False).logits.sum().backward()
    return count.numbers, sum(each.numel() for each in base.model.model.layers.parameters())


def sharded_everywhere(folder):
    """A model that somebody gave to FSDP2, its embeddings included."""
    return fully_shard(AutoModelForCausalLM.from_pretrained(folder))


LOST = """
import os, signal, sys
from softprompt.cli.main import run
from softprompt.training.gradients import Step
from softprompt.world import launched

done = getattr(Step, sys.argv[1])

def ended(step, *given):
    if launched().rank == 1 and step._state.update == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return done(step, *given)

setattr(Step, sys.argv[1], ended)
sys.exit(run(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: write_base(folder / name, name) for name in ("llama", "gpt_neo")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("saved") / "prompt"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, bases, saved):
    return run_together(work, tmp_path_factory.mktemp("group"), bases, str(saved))


@pytest.fixture(scope="module")
def further_ranks(tmp_path_factory, bases):
    folder = tmp_path_factory.mktemp("further")
    others = {name: write_base(folder / name, name) for name in OTHERS}
    odd = write_base(folder / "odd", "llama", num_key_value_heads=1)
    Path(odd, "model.gguf").touch()
    return run_together(further_work, tmp_path_factory.mktemp("group"), bases, others, odd)


def assert_alike(found, kinds, engine=None, within=1e-5):
    """Scores and gradients are those of the whole base, and its weights, facts and fingerprint too."""
    for kind in kinds:
        (_, values, gradient), (name, others, bent) = found[kind]
        assert engine in (None, name)
        torch.testing.assert_close(others, values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bent, gradient, rtol=0, atol=within * float(gradient.abs().max()))
    for what in ("facts", "fingerprint"):
        whole, sharded = found[what]
        assert sharded == whole
    assert len(set(found["weights"])) == 1  # a whole one's, before the passes and after them


@pytest.mark.slow
@pytest.mark.parametrize(("name", "engine"), [("llama", "forest"), ("gpt_neo", "expand")])
def test_fsdp_gives_the_same_scores_and_gradients_by_the_same_engine(ranks, name, engine):
    for found in ranks:
        assert_alike(found[name], PROMPTS if name == "llama" else PROMPTS[:1], engine)


@pytest.mark.slow
def test_a_process_holds_its_share(ranks):
    for name in ("llama", "gpt_neo"):
        shares = [found[name]["held"] for found in ranks]
        assert {each[0] for each in shares} == {"fsdp"}
        assert all(each[1] < 0.8 for each in shares)  # of so small a base the embeddings are much
        assert sum(each[1] for each in shares) >= 1


def assert_used_alike(found, whole):
    torch.testing.assert_close(found[0], whole[0], rtol=0, atol=1e-5)
    assert found[1:] == whole[1:]


@pytest.mark.slow
def test_rows_shared_out_give_the_prompt_of_one_process(ranks, bases, saved):
    """Of nine records the last batch has one, so a process has none."""
    whole = used(tune(bases["llama"], *RECORDS, **HOW))
    for found in ranks:
        assert_used_alike(found["tuned"], whole)
        torch.testing.assert_close(found["tuned"][0], ranks[0]["tuned"][0], rtol=0, atol=0)
    torch.testing.assert_close(load(saved).prompt().input, ranks[0]["tuned"][0].to(whole[0]), rtol=0, atol=0)


@pytest.mark.slow
def test_passes_that_could_differ_in_number_are_run_by_all(further_ranks, bases):
    whole = used(tune(bases["gpt_neo"], *RECORDS, **HOW))
    for found in further_ranks:
        assert_used_alike(found["tuned by expand"], whole)


@pytest.mark.slow
def test_a_table_that_somebody_sharded_is_refused(ranks):
    for found in ranks:
        assert "has a sharded embedding table, and prompts need its values outside a pass" in found["table"]


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(further_ranks, name):
    for found in further_ranks:
        assert_alike(found[name], PROMPTS, within=5e-5)  # T5's ReLU turns with rounding


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp", "tp again", "fsdp again"])
def test_split_layers_and_layers_that_run_again(further_ranks, name):
    for found in further_ranks:
        assert_alike(found[name], PROMPTS[:1], "forest")
        assert found[name]["held"][0] == name.split()[0]


@pytest.mark.slow
def test_tensor_parallel_training(further_ranks, bases):
    whole = used(tune(bases["llama"], *RECORDS, **HOW))
    for found in further_ranks:
        assert_used_alike(found["tuned"], whole)
        assert found["memory"][1] < found["memory"][0]


@pytest.mark.slow
def test_pefts_interface_over_them(further_ranks):
    for found in further_ranks:
        (logits, gradient, tokens), *others = found["prompted"]
        for other, bent, same in others:
            torch.testing.assert_close(other, logits, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(bent, gradient, rtol=1e-5, atol=1e-6)
            assert torch.equal(same, tokens)


@pytest.mark.slow
def test_the_wire_carries_what_the_cost_model_says(further_ranks):
    for found in further_ranks:
        (gathered, weights), (summed, _) = found["wire"]
        assert gathered == 2 * weights
        assert summed == (2 + 5) * families.L * 7 * families.H


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("prefix", "is split by heads (shard tp)"),
        ("heads", "heads (1 of keys) do not split into 2 processes"),
        ("plan", "GPTNeoForCausalLM has no plan for tensor parallelism; use shard='fsdp'"),
        ("gguf", "a GGUF file cannot be sharded"),
        ("in memory", "shard tp splits a base while it is read"),
    ],
)
def test_what_cannot_be_sharded_is_refused_by_all(further_ranks, what, said):
    for found in further_ranks:
        assert said in found["refused"][what]


@pytest.mark.slow
@pytest.mark.parametrize("before", ["rows", "add"])  # a pass, and its backward
def test_a_process_lost_in_a_pass_is_named_and_resumed_from(bases, tmp_path, before):
    data, output = tmp_path / "train.jsonl", tmp_path / "prompt"
    data.write_text("".join(json.dumps(each) + "\n" for each in ALL))
    words = ["tune", "--base-model", bases["llama"], "--shard", "fsdp", "--train-data", data, "--output", output]
    words += ["--num-virtual-tokens", 3, "--num-epochs", 2, "--batch-size", 4, "--verbalizer", "{{input}} Label: "]
    (code, stdout, stderr), (killed, *_) = run_ranks(LOST, before, *words)
    assert (code, killed, stdout) == (2, -signal.SIGKILL, "")
    last = stderr.splitlines()[-1]
    assert last.startswith("Error: rank 1 of 2 ended: without a word; training was stopped after update 4 (epoch ")
    assert last.endswith(f"continue with: softprompt tune --resume --output {output}")
    assert "Traceback" not in stderr


def test_one_process_is_told_to_start_others(monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="start it with torchrun --nproc-per-node N"):
        load_base("demo", shard="fsdp")
    with pytest.raises(ConfigError, match="one of fsdp, tp, got 'zero3'"):
        load_base("demo", shard="zero3")


def test_what_deepspeed_partitioned_is_named():
    model = families.causal("llama")
    table = model.get_input_embeddings()
    table.weight = nn.Parameter(torch.empty(0))  # what ZeRO-3 leaves of a weight outside its passes
    table.weight.ds_id = 0
    with pytest.raises(BackboneError, match=r"partitioned by DeepSpeed ZeRO-3.*--shard fsdp"):
        Base(model).facts  # noqa: B018
