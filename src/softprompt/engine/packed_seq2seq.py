"""The forest path of seq2seq models: encoder and decoder rows packed, logits packed with them.

The encoder's prompt sees the input, as in PEFT, so it is computed for each source; rows with
the same prompt and source (the labels of one input) share one encoder row. With
``prompt_sees_input=False`` the prompt's states do not depend on the input and are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.backbone.facts import facts_of, output_limit, recomputes_layers, skips_layers
from softprompt.engine.attention import ForestUnsupportedError, LayerMask, forest_attention
from softprompt.engine.context import check_rows, check_table
from softprompt.engine.encoder_plan import EncoderPlan, encoder_plan
from softprompt.engine.packed_layers import Packing, layers_of, packed_layers, relative_bias
from softprompt.engine.plain import PlainEngine, pad_rows
from softprompt.engine.predictions import HeadInput, PredictingEngine, Predictions
from softprompt.engine.rows import EngineRow
from softprompt.engine.virtual import virtual_rows
from softprompt.engine.visibility import across, chains


@final
class PackedSeq2SeqEngine(PredictingEngine):
    """Scores targets of a seq2seq model without padding in its layers."""

    name = "forest"

    def __init__(self, model: PreTrainedModel, *, prompt_sees_input: bool = True) -> None:
        """Prepare for a model.

        Raises:
            ForestUnsupportedError: If its stacks cannot be packed.
        """
        self._model = model
        self._facts = facts_of(model)
        self._sees_input = prompt_sees_input
        if not self._facts.is_encoder_decoder:
            raise ForestUnsupportedError(f"{type(model).__name__} has no encoder")
        if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise ForestUnsupportedError(
                f"{type(model).__name__} does not say how it shifts labels"
            )
        self._plain = PlainEngine(model, prompt_sees_input=prompt_sees_input)
        self._encoder = model.get_encoder()
        self._decoder = cast(Any, model).get_decoder()

    def predict(
        self, rows: Sequence[EngineRow], prompts: Sequence[Tensor], head: HeadInput | None = None
    ) -> Predictions:
        """Run the rows; see ``PredictingEngine``.

        Raises:
            DataError: If nothing stands before a row's answer.
            ContextOverflowError: If a row does not fit behind its prompt.
        """
        check_table(self._model, self._facts)
        check_rows(rows, prompts, self._facts, output_limit(self._model))
        if recomputes_layers(self._model) or skips_layers(self._model):
            # Backward would run the layers again without the hooks that pack them; or the first
            # layer, which does the packing, may be left out.
            return self._plain.predict(rows, prompts, head)
        sources = list(dict.fromkeys((row.prompt, row.source) for row in rows))
        number = {source: i for i, source in enumerate(sources)}
        plan = encoder_plan(
            sources, [len(p) for p in prompts], self._facts.vocabulary, self._sees_input
        )
        with forest_attention(self._model):
            states = self._encode(plan, prompts)
            owner = [number[row.prompt, row.source] for row in rows]
            logits, labels = self._decode(rows, owner, states, plan)
        hidden = head.states[0] if head is not None and head.states is not None else None
        row_index = [i for i, row in enumerate(rows) for _ in row.target]
        place = torch.arange(len(labels), device=labels.device)
        return Predictions(
            logits, hidden, place, labels, torch.tensor(row_index, device=labels.device)
        )

    def _encode(self, plan: EncoderPlan, prompts: Sequence[Tensor]) -> Tensor:
        """Return packed encoder states ``[1, N, H]``."""
        device = self._model.device
        ids, mask = plan.padded(self._facts.pad_id)
        rows = [prompts[p] for p in plan.used if len(prompts[p])]
        table = torch.cat(rows) if rows else None
        see = plan.visibility()
        bias = relative_bias(self._encoder, int(ids.shape[1]))
        packing = Packing.of(mask.to(device))
        layers = layers_of(self._encoder)
        with (
            virtual_rows(self._model, table),
            packed_layers(layers, packing, LayerMask.of(see.to(device), bias), unpack=False),
        ):
            states: Tensor = self._encoder(
                input_ids=ids.to(device), attention_mask=mask.to(device)
            ).last_hidden_state
        return states

    def _decode(
        self, rows: Sequence[EngineRow], owner: Sequence[int], states: Tensor, plan: EncoderPlan
    ) -> tuple[Tensor, Tensor]:
        """Return packed logits ``[M, V]`` and the target tokens ``[M]``."""
        device = self._model.device
        labels, mask = pad_rows([row.target for row in rows], left=False, pad_id=self._facts.pad_id)
        labels, mask = labels.to(device), mask.to(device)
        targets = [len(row.target) for row in rows]
        self_mask = LayerMask.of(
            chains(targets).to(device), relative_bias(self._decoder, max(targets))
        )
        keys = [plan.keys[k] for k in owner]
        cross = LayerMask.of(across(targets, keys, plan.positions).to(device))
        start = cast(Any, self._model).prepare_decoder_input_ids_from_labels(labels=labels)
        packing = Packing.of(mask)
        with packed_layers(layers_of(self._decoder), packing, self_mask, cross=cross, unpack=False):
            logits = self._model(
                encoder_outputs=(states,),
                attention_mask=torch.ones(1, states.shape[1], dtype=torch.long, device=device),
                decoder_input_ids=start,
                use_cache=False,
            ).logits[0]
        return logits, labels[mask.bool()]
