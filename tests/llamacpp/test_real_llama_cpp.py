"""An export that llama.cpp's own converter has made a GGUF file of gives softprompt's answers in llama.cpp.

`make test-llamacpp` installs both into a folder of their own and runs this; nothing is compiled.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers as tf

import softprompt
from oracles import families
from oracles.real_model import smollm2
from oracles.serving import write_prompt
from softprompt.backbone import load_base
from softprompt.bundled import model_directory
from softprompt.inference import convert

HERE = Path(__file__).parent
PLACE = Path(os.environ.get("SOFTPROMPT_LLAMACPP", HERE.parents[1] / ".venv-llamacpp"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PLACE / ".ready").exists(), reason=f"needs llama.cpp in {PLACE}: run make test-llamacpp"
    ),
]

TEXTS = ["The kettle broke after  one day", "Größe: 3 € 🙂", "1, 2, 3, 4,"]
NEW = 8


def byte_level() -> tf.PreTrainedTokenizerBase:
    """A tokenizer that the converter knows by what it makes of a text: that of SmolLM2, which adds no BOS."""
    tokenizer: Any = tf.AutoTokenizer.from_pretrained(smollm2())
    return tokenizer


TOKENIZERS = {"byte-level": byte_level}


def run(*words: Any, **options: Any) -> Any:
    """Start Python with what `make test-llamacpp` installed, beside what this environment has."""
    environment = {**os.environ, "PYTHONPATH": str(PLACE / "packages"), "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, *map(str, words)], env=environment, text=True, stdout=subprocess.PIPE, **options
    )


def converted(folder: Path, file: Path, *options: str) -> str:
    """Make a GGUF file of a model folder as the page says, and return what the converter printed."""
    words = (PLACE / "llama.cpp" / "convert_hf_to_gguf.py", folder, "--outfile", file, *options)
    with run(*words, stderr=subprocess.STDOUT) as process:
        printed: str = process.communicate(timeout=600)[0]
    return printed


@dataclass
class Case:
    """An export behind llama.cpp's server, and the prompt in softprompt that it was made of."""

    name: str
    client: httpx.Client
    tuned: softprompt.TunedPrompt
    entry: dict[str, Any]
    model: Any
    tokenizer: Any

    def post(self, path: str, **body: Any) -> Any:
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ids(self, text: str) -> list[int]:
        """Return the ids of the virtual tokens and of the rendered template behind them."""
        rendered = self.entry["template"].replace("{{input}}", text)
        return [*self.entry["token_ids"], *self.tokenizer(rendered)["input_ids"]]

    def answer(self, prompt: Any) -> Any:
        forbidden = [[number, False] for number in self.entry["token_ids"]]
        settings = {
            "temperature": 0,
            "n_predict": NEW,
            "n_probs": 5,
            "return_tokens": True,
            "logit_bias": forbidden,
        }
        return self.post("/completion", prompt=prompt, **settings)


@pytest.fixture(scope="module", params=TOKENIZERS)
def case(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("llamacpp")
    tokenizer = TOKENIZERS[request.param]()
    tiny = families.tiny("llama", vocab_size=len(tokenizer))
    for part in (tiny, tokenizer):
        part.save_pretrained(place / "base")
    base = load_base(str(place / "base"))
    write_prompt(place / "x", base, seed=1, length=5, task="generation", labels=None, template="{{input}}")
    convert(place / "x", place / "exported", to="extended-vocab")
    printed = converted(place / "exported", place / "x.gguf", "--outtype", "f32")
    assert (place / "x.gguf").exists(), printed[-2000:]
    entry = json.loads((place / "exported" / "softprompt_prompts.json").read_text())["prompts"]["x"]
    model = tf.AutoModelForCausalLM.from_pretrained(place / "exported").eval()
    with run(HERE / "server.py", place / "x.gguf", stdin=subprocess.PIPE) as process:
        url = process.stdout.readline().strip()
        try:
            with httpx.Client(base_url=url, timeout=300) as client:
                tuned = softprompt.load(place / "x", str(place / "base"))
                extended = tf.AutoTokenizer.from_pretrained(place / "exported")
                yield Case(request.param, client, tuned, entry, model, extended)
        finally:
            process.stdin.close()


def test_ids_give_the_same_answers_and_log_probabilities(case):
    for text in TEXTS:
        ids = case.ids(text)
        answer = case.answer(ids)
        assert answer["tokens_evaluated"] == len(ids)
        inputs = torch.tensor([ids])
        with torch.inference_mode():
            expected = case.model(inputs).logits[0, -1].log_softmax(-1)
            greedy = case.model.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=NEW, do_sample=False
            )
        first = answer["completion_probabilities"][0]["top_logprobs"]
        assert len(first) == 5
        assert [each["logprob"] for each in first] == pytest.approx(
            [float(expected[each["id"]]) for each in first], abs=1e-4
        )
        assert answer["tokens"] == greedy[0, len(ids) :].tolist()
        (ours,) = case.tuned.generate([text], max_new_tokens=NEW)
        said = case.tokenizer.decode(answer["tokens"], skip_special_tokens=True)
        assert said.removeprefix(" ") == ours.text.removeprefix(" ")


def test_the_text_of_the_virtual_tokens(case):
    """A text gives the same ids where the tokenizer adds no BOS; llama.cpp puts BOS before the virtual tokens."""
    for text in TEXTS:
        form = case.entry["text"]
        written = form["before"] + case.entry["template"].replace("{{input}}", text) + form["after"]
        found = case.post("/tokenize", content=written, add_special=True)["tokens"]
        bos = [] if form["add_special_tokens"] else [case.tokenizer.bos_token_id]
        assert found == bos + case.ids(text)
        assert case.post("/tokenize", content=written, add_special=False)["tokens"] == case.ids(text)


def test_a_tokenizer_that_the_converter_does_not_know_is_refused(tmp_path):
    printed = converted(model_directory(), tmp_path / "x.gguf", "--vocab-only")
    assert "BPE pre-tokenizer was not recognized" in printed
    assert not (tmp_path / "x.gguf").exists()
