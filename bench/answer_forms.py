"""What holding an answer to a form costs: llguidance, which is used, beside outlines-core, where that is installed.

Of three JSON schemas: CPU seconds from the schema to the first mask, MiB of memory that came with it, and the
milliseconds of each mask over the tokens of a document (of the first schema), on one tokenizer.

    python bench/answer_forms.py [--tokenizer FOLDER] [--json]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from transformers import AutoTokenizer

from alone import alone
from softprompt.bundled import model_directory
from softprompt.generation import GenerationOptions
from softprompt.generation.forms import Forms

ORDER = {"id": {"type": "integer"}, "price": {"type": "number"}, "notes": {"type": ["string", "null"]}}
ADDRESS = {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}}
CUSTOMER = {
    "name": {"type": "string", "maxLength": 60},
    "age": {"type": "integer", "minimum": 0, "maximum": 130},
    "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
    "kind": {"enum": ["private", "company", "public body"]},
    "address": {"type": "object", "properties": ADDRESS, "required": ["street", "zip"]},
    "orders": {
        "type": "array",
        "maxItems": 5,
        "items": {"type": "object", "properties": ORDER, "required": ["id"]},
    },
}
DOCUMENT = {
    "name": "Ann Smith",
    "age": 41,
    "tags": ["new", "late"],
    "kind": "company",
    "address": {"street": "1 Long Road", "zip": "12345"},
    "orders": [{"id": 1, "price": 2.5, "notes": None}, {"id": 2}],
}
TEXTS = {name: {"type": "string", "maxLength": 500} for name in "ab"}


def closed(schema: Any) -> Any:
    """Return a schema whose objects have the properties that it names, and no others."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    more = {"additionalProperties": False} if schema.get("type") == "object" else {}
    return {name: closed(each) for name, each in schema.items()} | more


SCHEMAS = {
    "a customer with orders": closed({"type": "object", "properties": CUSTOMER, "required": list(CUSTOMER)}),
    "two texts of up to 500": closed({"type": "object", "properties": TEXTS, "required": ["a", "b"]}),
    "any object": {"type": "object"},
}
"""By what they are of."""

Masks = Callable[[list[int]], Iterator[float]]
"""Seconds of the mask before each token."""


def with_llguidance(tokenizer: Any) -> Callable[[Any], Masks]:
    """Return what makes masks of a schema as answers are held to it."""
    forms = Forms(tokenizer, [tokenizer.eos_token_id])

    def compiled(schema: Any) -> Masks:
        matcher = forms.matcher(GenerationOptions(json_schema=schema))

        def masks(tokens: list[int]) -> Iterator[float]:
            for token in tokens:
                began = time.process_time()
                matcher.compute_bitmask()
                yield time.process_time() - began
                assert matcher.consume_token(token), tokenizer.decode([token])

        return masks

    return compiled


def with_outlines(tokenizer: Any) -> Callable[[Any], Masks]:
    """Return the same by an index over the vocabulary, which is made first."""
    outlines: Any = import_module("outlines_core")
    pieces: dict[bytes, list[int]] = {}
    for token, number in tokenizer.get_vocab().items():
        if number not in tokenizer.all_special_ids:
            pieces.setdefault(tokenizer.convert_tokens_to_string([token]).encode(), []).append(number)
    vocabulary = outlines.Vocabulary(tokenizer.eos_token_id, {text: ids for text, ids in pieces.items() if text})

    def compiled(schema: Any) -> Masks:
        guide = outlines.Guide(
            outlines.Index(outlines.json_schema.build_regex_from_schema(json.dumps(schema)), vocabulary)
        )

        def masks(tokens: list[int]) -> Iterator[float]:
            for token in tokens:
                began = time.process_time()
                guide.get_tokens()
                yield time.process_time() - began
                guide.advance(token)

        return masks

    return compiled


def memory() -> float:
    """Return the most MiB that the process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(library: Callable[[Any], Callable[[Any], Masks]], tokenizer: Any) -> dict[str, float]:
    """Return CPU seconds, MiB and milliseconds of one library."""
    before, began = memory(), time.process_time()
    compile_schema = library(tokenizer)
    found = {"tokenizer, s": time.process_time() - began, "tokenizer, MiB": memory() - before}
    for name, schema in SCHEMAS.items():
        before, began = memory(), time.process_time()
        masks = compile_schema(schema)
        found |= {f"{name}, s": time.process_time() - began, f"{name}, MiB": memory() - before}
        if schema is SCHEMAS["a customer with orders"]:
            seconds = list(masks(tokenizer.encode(json.dumps(DOCUMENT), add_special_tokens=False)))
            found |= {"mask, ms": 1e3 * statistics.mean(seconds), "slowest mask, ms": 1e3 * max(seconds)}
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", default=str(model_directory()))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    result = {"llguidance": measured(with_llguidance, tokenizer)}
    if find_spec("outlines_core"):
        result["outlines-core"] = measured(with_outlines, tokenizer)
    if args.json:
        print(json.dumps(result))
        return
    print(f"{len(tokenizer):,} tokens{'':24}" + "".join(f"{name:>15}" for name in result))
    for row in result["llguidance"]:
        print(f"{row:36}" + "".join(f"{found[row]:15.4f}" for found in result.values()))


if __name__ == "__main__":
    alone()
    main()
