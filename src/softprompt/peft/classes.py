"""One class per task type, base and prompt in one call, and PEFT's functions over them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from softprompt.artifacts import outside
from softprompt.backbone import text_key_values
from softprompt.bundled import source_of
from softprompt.engine import infer_task
from softprompt.errors import BackboneError, ConfigError, InterfaceError, broken, no_folder
from softprompt.peft.model import PeftModel as PeftModel  # noqa: PLC0414 - these classes come with it
from softprompt.prompts import (
    PROMPT_KEY,
    PeftConfig,
    PeftType,
    TaskType,
    config_class,
    prompt_embeddings_from_past_key_values,
)


class PeftModelForCausalLM(PeftModel, task=TaskType.CAUSAL_LM):
    """Prompts on a decoder language model."""


class PeftModelForSeq2SeqLM(PeftModel, task=TaskType.SEQ_2_SEQ_LM):
    """Prompts before the encoder of a seq2seq language model."""


class PeftModelForSequenceClassification(PeftModel, task=TaskType.SEQ_CLS):
    """Prompts and a head that labels whole sequences."""


class PeftModelForTokenClassification(PeftModel, task=TaskType.TOKEN_CLS):
    """Prompts and a head that labels each token; logits cover P + T columns."""


class PeftModelForQuestionAnswering(PeftModel, task=TaskType.QUESTION_ANS):
    """Prompts and a head that points at a span; positions count P + T columns."""


class PeftModelForFeatureExtraction(PeftModel, task=TaskType.FEATURE_EXTRACTION):
    """Prompts before a bare encoder or decoder; hidden states cover P + T columns."""


def get_peft_model(
    model: PreTrainedModel | nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Freeze a model, of transformers or any other module, and attach a new prompt.

    ``revision`` is the base's, for the record. Prompts are float32 and small, so ``autocast_adapter_dtype`` and
    ``low_cpu_mem_usage`` change nothing.

    Raises:
        ConfigError: If the model or the configuration cannot be used.
    """
    if mixed:
        raise InterfaceError("mixed=True is for methods that change weights; prompts are mixed by adapter_names")
    if revision is not None:
        peft_config = copy.copy(peft_config)  # and not replaced, which would forget that it came in a file
        peft_config.revision = revision
    task = TaskType(peft_config.task_type) if peft_config.task_type else infer_task(cast(PreTrainedModel, model))
    return PeftModel.classes[task](model, peft_config, adapter_name)


def prepare_model_for_kbit_training(
    model: PreTrainedModel,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> PreTrainedModel:
    """Freeze a model and cast its half-precision parameters to float32, as PEFT does, and return it.

    A quantised model keeps its packed weights, and gets gradient checkpointing if that is asked for; how it is
    quantised decides what is cast. ``auto_clear_cache`` gives the freed memory of an accelerator back.
    """
    checkpointing = dict(gradient_checkpointing_kwargs or {})
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    named = str(getattr(method, "quant_method", "") or getattr(model, "quantization_method", "")).lower()
    packed = any(kind in named for kind in ("gptq", "aqlm", "eetq", "torchao", "hqq"))
    quantised = packed or any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        half = parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit"
        if half and not packed:
            parameter.data = parameter.data.float()
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if quantised and use_gradient_checkpointing:
        if checkpointing.get("use_reentrant", True):
            cast(Any, model).enable_input_require_grads()
        named = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{named}_checkpointing_enable")(checkpointing or None)
    return model


MODEL_TYPE_TO_PEFT_MODEL_MAPPING = PeftModel.classes
"""Class of each task type."""

PEFT_TYPE_TO_CONFIG_MAPPING = {kind: config_class(kind) for kind in PeftType}
"""Configuration class of each method."""


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """Return the configuration whose method ``config_dict["peft_type"]`` names."""
    return PeftConfig.from_peft_type(**config_dict)


_LOADERS: dict[TaskType, Any] = {
    TaskType.CAUSAL_LM: AutoModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: AutoModelForSeq2SeqLM,
    TaskType.SEQ_CLS: AutoModelForSequenceClassification,
    TaskType.TOKEN_CLS: AutoModelForTokenClassification,
    TaskType.QUESTION_ANS: AutoModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: AutoModel,
}


class AutoPeftModel:
    """Loads the base that a saved prompt names, then attaches the prompt."""

    task: ClassVar[TaskType | None] = None

    def __init__(self) -> None:
        raise ConfigError(f"{type(self).__name__} is not instantiated; call its from_pretrained")

    def __init_subclass__(cls, task: TaskType) -> None:
        """Bind a subclass to one task."""
        super().__init_subclass__()
        cls.task = task

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        ignore_fingerprint: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """Load base and prompt; see ``PeftModel.from_pretrained``.

        ``config`` replaces the file's, ``revision`` is the prompt's on the Hub, ``kwargs`` what the base's
        ``from_pretrained`` takes, such as ``dtype``; ``token`` and ``cache_dir`` among them are for both.

        Raises:
            ArtifactError: If the prompt is missing or damaged.
            ConfigError: If it names no base, or is for another task than this class.
        """
        hub: dict[str, Any] = {name: kwargs[name] for name in ("token", "cache_dir") if name in kwargs} | {
            "revision": revision
        }
        given = config
        config = given or PeftConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        if config.task_type is None or config.base_model_name_or_path is None:
            raise ConfigError(
                f"{pretrained_model_name_or_path} names no task_type or base model; "
                "load the base yourself and use PeftModel.from_pretrained"
            )
        task = TaskType(config.task_type)
        if cls.task not in (None, task):
            raise ConfigError(f"{cls.__name__} loads task_type {cls.task}, the prompt is for {task}")
        folder = Path(pretrained_model_name_or_path)
        source, file = source_of(outside(config.base_model_name_or_path, folder))
        if config.revision is None and (said := no_folder(source, before_hub=True)):
            raise BackboneError(f"base model: {said}")
        # Unset, transformers asks on stdin whether to run the code that a base names.
        kwargs.setdefault("trust_remote_code", False)
        model = _LOADERS[task].from_pretrained(source, revision=config.revision, **file, **kwargs)
        return PeftModel.from_pretrained(
            model,
            pretrained_model_name_or_path,
            adapter_name,
            is_trainable,
            given,
            ignore_fingerprint=ignore_fingerprint,
            **hub,
        )


class AutoPeftModelForCausalLM(AutoPeftModel, task=TaskType.CAUSAL_LM):
    """Loads a decoder language model with its prompt."""


class AutoPeftModelForSeq2SeqLM(AutoPeftModel, task=TaskType.SEQ_2_SEQ_LM):
    """Loads a seq2seq language model with its prompt."""


class AutoPeftModelForSequenceClassification(AutoPeftModel, task=TaskType.SEQ_CLS):
    """Loads a sequence classifier with its prompt and head."""


class AutoPeftModelForTokenClassification(AutoPeftModel, task=TaskType.TOKEN_CLS):
    """Loads a token classifier with its prompt and head."""


class AutoPeftModelForQuestionAnswering(AutoPeftModel, task=TaskType.QUESTION_ANS):
    """Loads a span extractor with its prompt and head."""


class AutoPeftModelForFeatureExtraction(AutoPeftModel, task=TaskType.FEATURE_EXTRACTION):
    """Loads a bare model with its prompt."""


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: PeftModel,
    *,
    adapter_name: str | None = None,
    past_key_values: Any,
    num_virtual_tokens: int | None = None,
) -> Tensor:
    """Set a prefix or cartridge to the first tokens of a cache, frozen tokens included.

    Args:
        model: The model it is attached to.
        adapter_name: Its name; None is the active one.
        past_key_values: Cache of one sequence, without the prompt in it; see
            ``prompt_embeddings_from_past_key_values``.
        num_virtual_tokens: Tokens to take (P); the prompt's own number, or None.

    Returns:
        What was set, ``[P, L·2·A_kv·D]``.

    Raises:
        AdapterError: If there is no such prompt.
        ConfigError: If it is no prefix and no cartridge, is projected, or the cache does not fit.
    """
    name = model.active_adapter if adapter_name is None else adapter_name
    length = _length(model, name, num_virtual_tokens)
    values = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=length)
    model.encoder_of(name).load_stored({PROMPT_KEY: values})
    return values


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Set a prefix or cartridge to the keys and values of a text's first tokens.

    Only the tokens that are taken run through the base: in a causal model the others change nothing. The
    text is cut to ``max_length`` tokens first; ``use_chat_template`` puts it in the system turn of the
    tokenizer's chat template, if it has one. The prompt, P and what is returned are as for
    ``initialize_kv_prefix_from_past_key_values``.

    Raises:
        SoftPromptError: As there; or if the text is too short, or the base's keys and values depend on an input.
    """
    name = model.active_adapter if adapter_name is None else adapter_name
    length = _length(model, name, num_virtual_tokens)
    ids = _token_ids(tokenizer, text, use_chat_template, max_length)[:length]
    if len(ids) < length:
        raise ConfigError(
            f"Need at least {length} cached tokens, got {len(ids)}; give a longer text, or lower num_virtual_tokens"
        )
    key_values = text_key_values(model.base_model, ids)
    cache = [(layer[0][None], layer[1][None]) for layer in key_values]
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=name, past_key_values=cache, num_virtual_tokens=length
    )


def _length(model: PeftModel, name: str, given: int | None) -> int:
    """Return the virtual tokens of a prompt that can be set to keys and values."""
    encoder, config = model.encoder_of(name), model.peft_config[name]
    if not config.keys_and_values:
        raise ConfigError(
            f"Adapter '{name}' must be a CARTRIDGE or PREFIX_TUNING adapter (got {config.peft_type})."
        )
    if getattr(encoder, "transform", None) is not None:
        raise ConfigError(
            "keys and values do not tell the parameters of a prefix with prefix_projection=True; train the "
            "prefix directly"
        )
    length = int(config.num_virtual_tokens or 0)
    if given not in (None, length):
        raise ConfigError(f"num_virtual_tokens is {given}, but the prompt {name!r} has {length}; leave it out")
    return length


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str, templated: bool, max_length: int | None) -> list[int]:
    """Return the token ids of a text, in the system turn of a chat where there is a template."""
    if problem := broken(text):
        raise ConfigError(f"the text holds {problem}; correct it")
    if templated and getattr(tokenizer, "chat_template", None):
        turn = [{"role": "system", "content": text}]
        try:
            ids: Any = tokenizer.apply_chat_template(turn, tokenize=True, return_dict=False)
            return list(ids)[:max_length]
        except (TypeError, ValueError):
            pass  # a tokenizer class with a signature of its own; its text is taken as it is
    cut = {"truncation": max_length is not None, "max_length": max_length}
    found: list[int] = tokenizer(text, **cut)["input_ids"]
    return found
