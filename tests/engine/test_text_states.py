"""Hidden states of texts behind prompts: those of the obvious pass over each row alone."""

import pytest
import torch

from oracles.caches import CACHE
from oracles.served import served
from oracles.slow import only
from softprompt.engine import EngineRow, text_states
from softprompt.errors import ConfigError, DataError

TEXTS = ((1, 40, 41, 42, 43, 44), (1, 99), (1, 50, 51, 52))


@pytest.fixture(scope="module", params=only(["llama", "bloom", "t5"], ["llama", "bloom", "gpt2", "t5"]))
def base(request):
    kinds = ("plain", "other") if request.param in ("t5", "bloom") else ("plain", "suffix", "prefix")
    return served(request.param, kinds=kinds)


def alone(base, row):
    """The states of one row's text, from embeddings put together by hand."""
    ids = torch.tensor([row.source])
    table = base.model.get_input_embeddings()
    rows = table(ids)
    if base.base.is_encoder_decoder:
        whole = rows if row.prompt is None else torch.cat([row.prompt.input.unsqueeze(0), rows], 1)
        states = base.model.get_encoder()(inputs_embeds=whole).last_hidden_state[0]
        return states[-len(row.source) :]
    if row.prompt is None or row.prompt.prefix is not None:
        from transformers import DynamicCache

        cache = None
        if row.prompt is not None:
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(row.prompt.prefix):
                cache.update(keys.unsqueeze(0), values.unsqueeze(0), layer)
        return base.model.base_model(input_ids=ids, **{CACHE: cache}).last_hidden_state[0]
    at, virtual = row.at, row.prompt.input.unsqueeze(0)
    states = base.model.base_model(
        inputs_embeds=torch.cat([rows[:, :at], virtual, rows[:, at:]], 1)
    ).last_hidden_state[0]
    return torch.cat([states[:at], states[at + virtual.shape[1] :]])


def test_a_batch_of_prompts_gives_each_row_its_own(base):
    rows = []
    for text in TEXTS:
        for name in (None, *base.prompts):
            request = base.request(name, text)
            rows.append(EngineRow(request.ids, (), request.prompt, request.at))
    kinds = [row for row in rows if row.prompt is None or row.prompt.prefix is None]
    prefixes = [row for row in rows if row.prompt is not None and row.prompt.prefix is not None]
    for part in filter(None, (kinds, prefixes)):
        with torch.no_grad():
            expected = [alone(base, row) for row in part]
        for found, own, row in zip(text_states(base.base, part), expected, part, strict=True):
            assert found.shape == (len(row.source), own.shape[1])
            torch.testing.assert_close(found, own, atol=2e-5, rtol=1e-4)


def test_what_does_not_fit_is_refused(base):
    with pytest.raises(DataError, match="tokens"):
        text_states(base.base, [EngineRow((9999,), ())])


def test_a_prefix_has_no_place_in_an_encoder():
    seq2seq = served("t5", kinds=("prefix",))
    with pytest.raises(ConfigError, match="embeds with its encoder"):
        text_states(seq2seq.base, [EngineRow((5, 6), (), seq2seq.values["prefix"])])
