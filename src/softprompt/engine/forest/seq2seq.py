"""The forest path of seq2seq models: encoder and decoder rows packed, logits where a target is.

The encoder's prompt sees the input, as in PEFT, so it is computed for each input. Rows with the
same prompt and input (the labels of one input) share one encoder row, and below it the decoder's
prompt and the tokens their answers begin with. With ``prompt_sees_input=False`` the prompt's
states do not depend on the input and are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.backbone import (
    decoder_embedding,
    facts_of,
    recomputes_layers,
    skips_layers,
    virtual_rows,
)
from softprompt.engine.context import check_rows
from softprompt.engine.forest.attention import ForestUnsupportedError, LayerMask, forest_attention
from softprompt.engine.forest.causal_plan import decoder_plan
from softprompt.engine.forest.encoder_plan import EncoderPlan, encoder_plan
from softprompt.engine.forest.layers import Packing, layers_of, packed_layers, relative_bias
from softprompt.engine.forest.plan import Plan
from softprompt.engine.placed import PlacedPrompts
from softprompt.engine.plain import PlainEngine, pad_rows
from softprompt.engine.predictions import HeadInput, PredictingEngine, Predictions
from softprompt.engine.rows import EngineRow, any_prefix


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
        check_rows(self._model, self._facts, rows, prompts, sees_input=self._sees_input)
        if recomputes_layers(self._model) or skips_layers(self._model) or any_prefix(rows, prompts):
            # Backward would run the layers again without the hooks that pack them; or the first
            # layer, which does the packing, may be left out. Keys and values stand in padded rows.
            return self._plain.predict(rows, prompts, head)
        placed = PlacedPrompts.of(prompts, (row.prompt for row in rows), self._facts.vocabulary)
        encoder = encoder_plan(rows, placed, self._sees_input)
        with forest_attention(self._model):
            with virtual_rows(self._model, placed.table):
                states = self._encode(encoder.plan)
            return self._decode(rows, prompts, encoder, states, head)

    def _encode(self, plan: Plan) -> Tensor:
        """Return packed encoder states ``[1, N, H]``."""
        bias, packing = self._prepared(self._encoder, plan)
        ids = packing.grid(plan.ids, self._filler).to(self._model.device)
        mask = LayerMask.of(plan.visibility().to(ids.device), bias)
        with packed_layers(layers_of(self._encoder), packing.to(ids.device), mask):
            states: Tensor = self._encoder(
                input_ids=ids, attention_mask=torch.ones_like(ids)
            ).last_hidden_state
        return states

    def _decode(
        self,
        rows: Sequence[EngineRow],
        prompts: Sequence[Tensor],
        encoder: EncoderPlan,
        states: Tensor,
        head: HeadInput | None,
    ) -> Predictions:
        device = self._model.device
        table = decoder_embedding(self._model).weight
        placed = PlacedPrompts.of(
            prompts, (row.decoder_prompt for row in rows), int(table.shape[0])
        )
        plan = decoder_plan(rows, encoder.owners, self._starts(rows), placed)
        bias, packing = self._prepared(self._decoder, plan)
        wanted, place = plan.targets.places()
        hooks = packed_layers(
            layers_of(self._decoder),
            packing.to(device),
            LayerMask.of(plan.visibility().to(device), bias),
            cross=LayerMask.of(plan.visibility_over(encoder.plan, encoder.owned).to(device)),
            keep=wanted.to(device),
        )
        with virtual_rows(self._model, placed.table, decoder=True), hooks:
            logits = self._model(
                encoder_outputs=(states,),
                attention_mask=torch.ones(1, states.shape[1], dtype=torch.long, device=device),
                decoder_input_ids=packing.grid(plan.ids, self._filler).to(device),
                use_cache=False,
            ).logits
        hidden = head.states if head is not None else None
        return Predictions.of_stream(logits, hidden, place, plan.targets)

    def _prepared(self, stack: nn.Module, plan: Plan) -> tuple[Tensor | None, Packing]:
        """Return a stack's relative position bias, and how its tokens are laid out for its embeddings."""
        bias = relative_bias(stack, int(plan.positions.max()) + 1)
        # With a bias positions are in attention alone; else the stack counts columns.
        packing = Packing.by_column(plan.positions) if bias is None else Packing.in_line(len(plan))
        return bias, packing

    @property
    def _filler(self) -> int:
        """An id for places that hold no token; not padding, which some models do not count."""
        return 0 if self._facts.pad_id else 1

    def _starts(self, rows: Sequence[EngineRow]) -> list[int]:
        """Return the token before each answer; mBART's is the answer's last."""
        labels, _ = pad_rows([row.target for row in rows], left=False, pad_id=self._facts.pad_id)
        shifted = cast(Any, self._model).prepare_decoder_input_ids_from_labels(labels=labels)
        starts: list[int] = shifted[:, 0].tolist()
        return starts
