"""The multitask module: PEFT's numbers, a start at one, and source prompts."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from softprompt import MultitaskPromptEmbedding, MultitaskPromptTuningConfig
from softprompt.artifacts import source_of
from softprompt.errors import ArtifactError, ConfigError
from softprompt.prompts import build_prompt

V, H, P, K, R = 11, 8, 4, 3, 2
SIZES = {"num_virtual_tokens": P, "token_dim": H, "num_tasks": K, "num_ranks": R}


@pytest.fixture
def table():
    torch.manual_seed(0)
    return nn.Embedding(V, H)


def config(**changes):
    return MultitaskPromptTuningConfig(
        **{"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 1, **SIZES, **changes}
    )


def built(settings, table, **options):
    """Return the module of a configuration, from the source prompt that it names."""
    return build_prompt(settings, table, source=source_of(settings), **options)


def trained(table, **changes):
    """Return a module whose factors are no longer special."""
    prompt = built(config(**changes), table)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return prompt


def written(path, table, **changes):
    source = trained(table, **changes).stored()
    if path.suffix == ".safetensors":
        save_file(source, path)
    else:
        torch.save(source, path)
    return source


def theirs_of(ours, **changes):
    options = {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 1, **SIZES, **changes}
    module = peft.tuners.MultitaskPromptEmbedding(peft.MultitaskPromptTuningConfig(**options), nn.Embedding(V, H))
    module.load_state_dict(ours.state_dict())
    return module


@pytest.mark.parametrize("submodules", [1, 2])
def test_values_and_gradients_equal_pefts(table, submodules):
    ours = trained(table, num_transformer_submodules=submodules)
    theirs = theirs_of(ours, num_transformer_submodules=submodules)
    indices = torch.arange(P * submodules).expand(4, -1)
    tasks = torch.tensor([2, 0, 2, 1])
    rows, expected = ours(indices, tasks), theirs(indices, tasks)
    assert torch.allclose(rows, expected, atol=1e-6)
    for row, task in zip(expected, tasks.tolist(), strict=True):
        assert torch.allclose(ours.materialize(task), row, atol=1e-6)
    weights = torch.randn(rows.shape)
    (rows * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, dict(theirs.named_parameters())[name].grad, atol=1e-5)


def test_more_ranks_than_rows_restrict_nothing(table):
    assert built(config(num_ranks=P), table).prefix_task_cols.shape == (K, P, P)
    with pytest.raises(ConfigError, match=r"num_ranks 5 restricts nothing .* use at most 4"):
        built(config(num_ranks=P + 1), table)
    built(config(num_ranks=P + 1, inference_mode=True), table)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_task_starts_at_the_shared_prompt(table, rank):
    prompt = built(config(num_ranks=rank), table)
    for task in range(K):
        assert torch.equal(prompt.materialize(task), prompt.embedding.weight)


def test_ranks_do_not_learn_the_same(table):
    prompt = built(config(num_ranks=3, num_tasks=1), table)
    optimiser = torch.optim.SGD([prompt.prefix_task_cols, prompt.prefix_task_rows], lr=0.1)
    target = torch.randn(P, H)
    for _ in range(3):
        optimiser.zero_grad()
        (prompt.materialize() - target).square().sum().backward()
        optimiser.step()
    matrix = prompt.prefix_task_cols[0] @ prompt.prefix_task_rows[0]
    assert int(torch.linalg.matrix_rank(matrix)) == 3


def test_pefts_start_is_reproducible(table):
    options = {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 1, **SIZES}
    torch.manual_seed(7)
    ours = built(config(task_matrix_init="normal"), table)
    torch.manual_seed(7)
    theirs = peft.tuners.MultitaskPromptEmbedding(peft.MultitaskPromptTuningConfig(**options), table)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    assert float(ours.materialize(0).detach().abs().mean()) < 1e-2


def test_a_generator_alone_decides(table):
    def drawn(seed, start):
        generator = torch.Generator().manual_seed(seed)
        return built(config(task_matrix_init=start), table, generator=generator).state_dict()

    for start in ("ones", "normal"):
        one, same, other = drawn(1, start), drawn(1, start), drawn(2, start)
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not torch.equal(one["prefix_task_cols"], other["prefix_task_cols"])


def test_files_hold_what_pefts_hold(table):
    prompt = trained(table)
    stored = prompt.stored()
    assert {name: tuple(value.shape) for name, value in stored.items()} == {
        "prompt_embeddings": (P, H),
        "prefix_task_cols": (K, P, R),
        "prefix_task_rows": (K, R, H),
    }
    again = built(config(), table)
    again.load_stored(stored)
    assert all(torch.equal(again.materialize(k), prompt.materialize(k)) for k in range(K))
    with pytest.raises(ArtifactError, match="lacks prefix_task_cols"):
        again.load_stored({"prompt_embeddings": stored["prompt_embeddings"]})


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
@pytest.mark.parametrize("init", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_source_inits_equal_pefts(table, tmp_path, suffix, init):
    path = tmp_path / f"source{suffix}"
    source = written(path, table)
    task = {"prompt_tuning_init_task": 2} if init == "EXACT_SOURCE_TASK" else {}
    options = {
        **task,
        "prompt_tuning_init": init,
        "prompt_tuning_init_state_dict_path": str(path),
        "num_tasks": 1,
    }
    ours = built(config(**options), table)
    theirs = peft.tuners.MultitaskPromptEmbedding(
        peft.MultitaskPromptTuningConfig(
            **{"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 1, **SIZES, **options}
        ),
        table,
    )
    assert torch.equal(ours.embedding.weight, source["prompt_embeddings"])
    if init == "ONLY_SOURCE_SHARED":
        assert torch.equal(ours.materialize(), source["prompt_embeddings"])
        return
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    several = built(config(**{**options, "num_tasks": 2}), table)
    assert all(torch.equal(several.materialize(k), ours.materialize()) for k in (0, 1))


def shared(path, **changes):
    return config(
        prompt_tuning_init="ONLY_SOURCE_SHARED",
        prompt_tuning_init_state_dict_path=str(path),
        **changes,
    )


def test_rows_alone_are_a_source_too(table, tmp_path):
    rows = torch.randn(P, H)
    save_file({"prompt_embeddings": rows}, tmp_path / "rows.safetensors")
    torch.save(rows, tmp_path / "encoder.pt")
    for name in ("rows.safetensors", "encoder.pt"):
        assert torch.equal(built(shared(tmp_path / name), table).materialize(2), rows)
    average = config(
        prompt_tuning_init="AVERAGE_SOURCE_TASKS",
        prompt_tuning_init_state_dict_path=str(tmp_path / "encoder.pt"),
    )
    with pytest.raises(ConfigError, match="needs a multitask source"):
        built(average, table)


def test_a_target_prompt_needs_no_source_file(table):
    finished = built(shared("gone.safetensors", inference_mode=True), table)
    finished.load_stored(trained(table).stored())
    with pytest.raises(ConfigError, match="is not there"):
        built(shared("gone.safetensors"), table)


class Code:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"prompt_embeddings": Code()}, "cannot be read"),
        (
            {"rows": torch.zeros(P, H)},
            "lacks prefix_task_cols, prefix_task_rows, prompt_embeddings",
        ),
        ([torch.zeros(P, H)], "must hold a dict of named tensors"),
        (torch.zeros(P, H, 1), r"it holds \[4, 8, 1\]"),
        (torch.full((P, H), float("nan")), "holds NaN or infinity"),
        (torch.zeros(P + 1, H), r"prompt_embeddings is \[5, 8\], this prompt needs \[4, 8\]"),
        (torch.zeros(P, H + 1), r"prompt_embeddings is \[4, 9\]"),
    ],
)
def test_files_that_are_no_source_are_refused(table, tmp_path, content, message, capsys):
    torch.save(content, tmp_path / "source.pt")
    with pytest.raises(ConfigError, match=message) as caught:
        built(shared(tmp_path / "source.pt"), table)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_sources_that_do_not_fit_are_refused(table, tmp_path):
    path = tmp_path / "source.safetensors"
    written(path, table)
    exact = {
        "prompt_tuning_init": "EXACT_SOURCE_TASK",
        "prompt_tuning_init_state_dict_path": str(path),
    }
    with pytest.raises(ConfigError, match="one of the source's 3 tasks, 0 to 2, got 3"):
        built(config(**exact, prompt_tuning_init_task=3), table)
    with pytest.raises(ConfigError, match=r"prefix_task_cols is \[3, 4, 2\], this prompt needs"):
        built(config(**exact, num_ranks=1), table)
    with pytest.raises(ConfigError, match="is a folder"):
        built(shared(tmp_path), table)


def test_tasks_that_do_not_exist(table):
    prompt = built(config(), table)
    assert prompt.num_tasks == K
    with pytest.raises(ConfigError, match=r"^task_ids cannot be None$"):
        prompt(torch.arange(P)[None], None)
    with pytest.raises(ConfigError, match="task_ids go from 0 to 2"):
        prompt.materialize(3)
    with pytest.raises(ConfigError, match="needs the source prompt; read it first"):
        MultitaskPromptEmbedding(shared("x.pt"), table)
