"""The goals of a distillation, measured on a real base: SmolLM2-135M-Instruct as a folder, or any causal model.

    python bench/distill_goals.py rules BASE OUTPUT             # a system prompt with rules of form
    python bench/distill_goals.py examples BASE OUTPUT DATA     # 16 demonstrations of Banking77, 10 intents
    python bench/distill_goals.py documents BASE OUTPUT         # two cartridges, each alone and side by side
    python bench/distill_goals.py served BASE OUTPUT            # a server's prefill, text against prompt

`--set` gives `distill` other settings, e.g. `--set kind=kv learning_rate=0.06`; with a `label_weight` the questions
of `examples` have labels. Each prints one JSON object and keeps it in OUTPUT; a run that was stopped goes on.
`served` serves the prompt that `rules` made. DATA is the folder with Banking77's `train.csv` and `test.csv`.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx

import softprompt
from alone import alone
from softprompt.distillation import DistillSettings, Question, Teacher, distill, measured_on, report_of
from softprompt.distillation.texts import SourceText

HERE = Path(__file__).parent
SYSTEM_PROMPT = HERE / "distill_system_prompt.txt"
PORT = 8471
ADDRESS = f"http://127.0.0.1:{PORT}"
TEMPLATE = "Customer: {{input}}\n"
FORM = re.compile(r"Answer: \S[^\n]*\nNext step: \S[^\n]*")
"""What the rules ask of an answer: two lines."""

ITEMS = ("tent", "stove", "backpack", "pair of boots", "jacket", "sleeping bag", "water filter", "headlamp")
ASKED = (
    "How long does it take until my {} arrives?",
    "The zip of my {} is broken.",
    "Can I send back the {} that I bought last week?",
    "Is there a guarantee on a {}?",
    "How much is delivery if I order one {}?",
    "My {} came with a dent. What now?",
    "Do I get a discount on a {} as a member?",
    "I want to pay for a {} by bank transfer.",
    "Can you repair my old {}?",
    "Where is the {} that I ordered?",
    "My {} is too small, can I change it?",
    "Do you have a {} in the shop on Saturday?",
    "I lost the receipt of my {}.",
    "Can I buy a {} with a gift card?",
    "Which {} do you recommend for winter?",
    "When do I get the money back for my {}?",
)
"""What is trained on, one item in each: 16 forms of 8 items."""
APART = (
    "Good morning, are you open today?",
    "Gift cards, do they run out at some point?",
    "I live abroad. When will I have my parcel?",
    "Tell me about the Trail Club.",
    "Nothing has come for two weeks!",
    "new soles for my boots, price?",
    "Which law protects me when I buy online?",
    "Thanks for the quick help yesterday.",
    "Is cash on delivery possible?",
    "What do I need for a claim under guarantee?",
    "The parcel looks as if a truck ran over it.",
    "Two tents for 50 euros, is the delivery free?",
    "Who are you?",
    "My doctor said I should walk more, what medicine helps with sore feet?",
    "I would like to talk to a human being.",
    "Could you open on Sunday for once?",
    "Where do I find the return label?",
    "It has been six days since you got my parcel back and I see no refund.",
    "Do repairs take longer before the holidays?",
    "Is the membership worth its 20 euros?",
    "Please cancel my order.",
    "What is the phone number of the shop next door?",
    "Your stove burns badly.",
    "How do I become a member?",
)
"""What is kept apart: messages of other forms."""


def distilled(
    arguments: argparse.Namespace, name: str, questions: list[dict[str, str]], **options: Any
) -> softprompt.TunedPrompt:
    """Distil into a folder of the output, or go on, or load what is there."""
    folder = Path(arguments.output) / name
    if (folder / "adapter_config.json").exists():
        return softprompt.load(folder, base_model=arguments.base)
    if (folder / ".state").exists():
        distill(output=folder, resume=True)
    else:
        distill(
            arguments.base,
            questions=questions,
            output=folder,
            num_epochs=arguments.epochs,
            batch_size=8,
            seed=arguments.seed,
            **options | dict(arguments.set),
        )
    return softprompt.load(folder, base_model=arguments.base)


def of_the_run(arguments: argparse.Namespace, name: str) -> list[Question]:
    """Return the questions of a distillation, answered."""
    lines = (Path(arguments.output) / name / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [Question(**json.loads(line)) for line in lines]


def teacher_of(tuned: softprompt.TunedPrompt, reading: SourceText) -> Teacher:
    """Return the base of a prompt with the text that it was made of."""
    return Teacher.of(tuned.base, reading, DistillSettings.from_dict(tuned.whole.settings["distillation"]))


def rules(arguments: argparse.Namespace) -> dict[str, Any]:
    """Distil the system prompt: the share of the way, and the answers that keep its form."""
    questions = [{"input": form.format(item)} for form in ASKED for item in ITEMS]
    random.Random(0).shuffle(questions)
    del questions[arguments.questions :]
    tuned = distilled(
        arguments,
        "rules",
        questions,
        system_prompt=SYSTEM_PROMPT,
        verbalizer=TEMPLATE,
        chat=False,
        num_virtual_tokens=32,
        max_source_length=64,
        max_target_length=32,
    )
    text = SYSTEM_PROMPT.read_text(encoding="utf-8").strip()
    teacher = teacher_of(tuned, SourceText("system prompt", (("rules", text),)))
    inputs = [{"input": each} for each in APART]
    found = measured_on(tuned, teacher, [Question(each, None) for each in inputs])
    report = report_of(found, of_the_run(arguments, "rules"))
    answers = {
        "text": [each.answer or "" for each in found.held_out.questions],
        "prompt": [each.text for each in tuned.generate(inputs, max_new_tokens=32)],
    }
    kept = {name: [bool(FORM.match(each.strip())) for each in texts] for name, texts in answers.items()}
    both = [ours for ours, theirs in zip(kept["prompt"], kept["text"], strict=True) if theirs]
    print(report)
    return {
        "report": report.to_dict(),
        "answers": len(APART),
        "text keeps the form": sum(kept["text"]),
        "of these the prompt keeps it": sum(both),
        "shown": {name: texts[:3] for name, texts in answers.items()},
    }


def banking(folder: Path, split: str, intents: int) -> dict[str, list[str]]:
    """Return the messages of the first intents by their name in words."""
    found: dict[str, list[str]] = defaultdict(list)
    with (folder / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found[row["category"].replace("_", " ")].append(row["text"])
    return {name: found[name] for name in sorted(found)[:intents]}


def examples(arguments: argparse.Namespace) -> dict[str, Any]:
    """Distil 16 demonstrations: accuracy of the demonstrations in context and of the prompt, on test messages."""
    draw, template = random.Random(arguments.seed), "Message: {{input}}\nIntent:"
    labelled = "label_weight" in dict(arguments.set)
    train, test = (banking(Path(arguments.data), split, 10) for split in ("train", "test"))
    drawn = {name: draw.sample(texts, 2 + arguments.questions // 10) for name, texts in train.items()}
    shown = [(texts[0], name) for name, texts in drawn.items()]
    shown += [(texts[1], name) for name, texts in list(drawn.items())[:6]]
    asked = [(text, name) for name, texts in drawn.items() for text in texts[2:]]
    draw.shuffle(shown)
    draw.shuffle(asked)
    records = [{"input": text, "output": name} for text, name in shown]
    tuned = distilled(
        arguments,
        "examples",
        [{"input": text} | ({"output": name} if labelled else {}) for text, name in asked],
        examples=records,
        verbalizer=template,
        task="classification",
        num_virtual_tokens=32,
        max_source_length=128,
        max_target_length=16,
    )
    reading = SourceText("examples", examples=[({"input": text}, name) for text, name in shown])
    teacher = teacher_of(tuned, reading)
    rows = [(text, name) for name in teacher.manifest.labels or () for text in test[name][: arguments.rows // 10]]
    questions = [Question({"input": text}, name, labelled=True) for text, name in rows]
    report = report_of(measured_on(tuned, teacher, questions), of_the_run(arguments, "examples"))
    print(report)
    return {"report": report.to_dict(), "rows": len(rows), "demonstrations": len(shown)}


DOCUMENTS = {name: (HERE / f"distill_{name}.txt").read_text(encoding="utf-8") for name in ("hotel", "ferry")}
ABOUT = {
    "hotel": (
        [
            "Where is the hotel?",
            "How many rooms are there?",
            "When does the front desk close?",
            "Who opens at night?",
        ],
        ["What does breakfast cost?", "Where is breakfast?", "When does the pool open?", "Can I bring my dog?"],
        ["Is my cat welcome?", "What is the password of the network?", "How long is the taxi to the station?"],
        ["When must I leave my room?", "What does a late departure cost?", "Can I have a bicycle?"],
    ),
    "ferry": (
        ["Where does the ferry start?", "When does the first ferry sail?", "How long is the crossing?"],
        ["What is the price of a ticket?", "What does a return ticket cost?", "Do children pay?"],
        ["When can I take my car?", "Who is the captain?", "What happens in a storm?", "What is sold on board?"],
        ["What does a bicycle cost?", "Where are lost things kept?", "Is there a cash machine on the island?"],
    ),
}
FORMS = ("{}", "Please tell me: {}", "A guest asks: {}", "Short question. {}")


def documents(arguments: argparse.Namespace) -> dict[str, Any]:
    """Distil two documents into cartridges, apart and beside each other; each alone, and both side by side."""
    root, apart = Path(arguments.output), {}
    prompts: dict[str, softprompt.TunedPrompt] = {}
    teachers: dict[str, Teacher] = {}
    for how in ("apart", "beside"):
        for name, text in DOCUMENTS.items():
            asked = [question for part in ABOUT[name] for question in part]
            apart[name] = [Question({"input": each}, None) for each in asked[::4]]
            used = [each for i, each in enumerate(asked) if i % 4]
            others = [root / f"{other}-apart" for other in DOCUMENTS if other != name]
            prompts[f"{name}-{how}"] = tuned = distilled(
                arguments,
                f"{name}-{how}",
                [{"input": form.format(each)} for each in used for form in FORMS],
                documents=[text],
                kind="kv",
                num_virtual_tokens=64,
                verbalizer="Question: {{input}}\nAnswer:",
                chat=False,
                max_source_length=64,
                max_target_length=24,
                report=False,
                **({"distractors": others} if how == "beside" else {}),
            )
            teachers[name] = teacher_of(tuned, SourceText("document", ((name, text.strip()),)))
        both = root / f"both-{how}"
        softprompt.concatenate_prompts([root / f"{name}-{how}" for name in DOCUMENTS], both, overwrite=True)
        prompts[f"both-{how}"] = softprompt.load(both, base_model=arguments.base)
    found: dict[str, Any] = {}
    for name, teacher in teachers.items():
        for prompt, tuned in prompts.items():
            reader = report_of(measured_on(tuned, teacher, apart[name]), ()).prompt
            found[f"{prompt} on {name}"] = {
                "nats": reader.nats,
                "agreement": reader.agreement,
                "share": reader.share,
            }
    return found


def served(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ask `softprompt serve` with the prompt of `rules`: tokens read for a request, seconds to the first token."""
    text = SYSTEM_PROMPT.read_text(encoding="utf-8").strip() + "\n\n"
    command = [sys.executable, "-m", "softprompt", "serve", "--base-model", arguments.base, "--prompts"]
    command += [arguments.output, "--served-model-name", "base", "--port", str(PORT)]
    found: dict[str, Any] = {}
    with subprocess.Popen(command) as server, httpx.Client(timeout=600, trust_env=False) as client:
        try:
            while not answers(client):
                time.sleep(1)
            for name, model, before in (("text", "base", text), ("prompt", "rules", "")):
                seconds, usage = [], {}
                for message in APART[: arguments.rows]:
                    asked = TEMPLATE.replace("{{input}}", message) if model == "base" else message
                    body = {"model": model, "prompt": before + asked, "max_tokens": 1, "temperature": 0}
                    begin = time.perf_counter()
                    usage = client.post(f"{ADDRESS}/v1/completions", json=body).json()["usage"]
                    seconds.append(time.perf_counter() - begin)
                found[name] = {
                    "usage": usage,
                    "first_request": seconds[0],
                    "median": statistics.median(seconds[1:]),
                }
        finally:
            server.terminate()
    return found


def answers(client: httpx.Client) -> bool:
    """Tell whether the server answers."""
    try:
        return client.get(f"{ADDRESS}/v1/models").is_success
    except httpx.TransportError:
        return False


def setting(text: str) -> tuple[str, Any]:
    """Read a setting of `distill`; a value that is no JSON is a text."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rules", "examples", "documents", "served"])
    parser.add_argument("base")
    parser.add_argument("output")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--questions", type=int, default=104, help="questions to train on, and to validate on")
    parser.add_argument("--rows", type=int, default=200, help="test messages of examples")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    more = "settings of distill, e.g. kind=kv"
    parser.add_argument("--set", type=setting, nargs="+", default=[], metavar="NAME=VALUE", help=more)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    measure = {"rules": rules, "examples": examples, "documents": documents, "served": served}[arguments.what]
    found = measure(arguments) | {"seconds": time.perf_counter() - begin}
    path = Path(arguments.output) / f"{arguments.what}.json"
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    alone()
    main()
