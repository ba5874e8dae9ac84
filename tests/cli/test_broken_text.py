"""Half a character, bytes that are not UTF-8 and NUL, on every way in: one clear line that says where, or taken."""

import io
import json
import os
import re
import subprocess
import sys

import pyarrow
import pytest
from pyarrow import feather, parquet

from oracles.slow import only
from softprompt import Serving, load, tune
from softprompt.cli.main import run
from softprompt.errors import ConfigError, DataError, SoftPromptError
from softprompt.evaluation import evaluate
from softprompt.prompts import PromptTuningConfig

QUICK = ["--num-epochs", "1", "--num-virtual-tokens", "2", "--batch-size", "4", "--quiet"]
HALF, PLACE = "late \ud83d again", r"half of a character (a lone surrogate, \ud83d) at 5 of a text"
BYTE = "caf\udce9"
"""What Python makes of ``caf\\xe9`` on a command line."""
ROWS = [{"input": f"it came {i}", "output": ["late", "fine"][i % 2]} for i in range(8)]


def broken_rows(name):
    return [*ROWS[:3], {**ROWS[3], name: HALF}, *ROWS[4:]]


def written(path, rows, encoding="utf-8"):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding=encoding)
    return str(path)


@pytest.fixture(scope="module", name="prompt")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompt")
    data = written(folder / "rows.jsonl", ROWS)
    assert run(["tune", "--train-data", data, "--output", str(folder / "out"), *QUICK]) == 0
    return str(folder / "out")


@pytest.fixture
def failure(capsys):
    def call(*arguments):
        assert run(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("Error: ")
        return err.removeprefix("Error: ").rstrip("\n")

    return call


@pytest.mark.parametrize("column", ["input", "output"])
def test_an_escape_in_a_file(failure, prompt, tmp_path, column):
    data = written(tmp_path / "rows.jsonl", broken_rows(column))
    expected = f"rows.jsonl, line 4: the field {column!r} holds {PLACE}; correct the record"
    assert failure("tune", "--train-data", data, "--output", str(tmp_path / "out"), *QUICK).startswith(expected)
    good = written(tmp_path / "good.jsonl", ROWS)
    words = ("tune", "--train-data", good, "--validation-data", data, "--output", str(tmp_path / "out"), *QUICK)
    assert failure(*words).startswith(expected)
    assert failure("evaluate", prompt, "--data", data, "--quiet").startswith(expected)
    listed = tmp_path / "rows.json"
    listed.write_text(json.dumps(broken_rows(column), indent=0))
    assert "rows.json, line " in failure("evaluate", prompt, "--data", str(listed), "--quiet")


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_latin_1_in_a_file(failure, prompt, tmp_path, suffix):
    line = {"jsonl": '{"input": "caf\u00e9", "output": "late"}', "csv": "caf\u00e9,late"}[suffix]
    head = {"jsonl": '{"input": "tea", "output": "fine"}', "csv": "input,output"}[suffix]
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(f"{head}\n{line}\n".encode("latin-1"))
    expected = f"rows.{suffix}, line 2: not UTF-8 (byte 0xe9); convert it to UTF-8"
    assert failure("tune", "--train-data", str(path), "--output", str(tmp_path / "out"), *QUICK) == expected
    assert failure("evaluate", prompt, "--data", str(path), "--quiet") == expected


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_bytes_that_are_not_utf8_in_a_table(failure, prompt, tmp_path, suffix):
    words = [row["input"].encode() for row in ROWS]
    words[5] = b"caf\xe9"
    texts = pyarrow.array(words, pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"input": texts, "output": [row["output"] for row in ROWS]})
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        parquet.write_table(table, path)
    else:
        feather.write_feather(table, path, compression="uncompressed")
    expected = f"rows.{suffix}, record 6: not UTF-8 (byte 0xe9); convert it to UTF-8"
    assert failure("evaluate", prompt, "--data", str(path), "--quiet") == expected


@pytest.mark.parametrize("lines", [b"tea\n\ncaf\xe9\n", "tea\n\nlate \ud83d\n".encode(errors="surrogatepass")])
def test_lines_of_stdin(failure, prompt, monkeypatch, lines):
    expected = r"stdin is not UTF-8: byte 0x(e9|ed) in line 3; convert the text first"
    for stdin in (
        io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"),
        io.TextIOWrapper(io.BytesIO(lines), encoding="ascii", errors="surrogateescape"),
        io.StringIO(lines.decode(errors="surrogatepass" if b"\xed" in lines else "surrogateescape")),
    ):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert re.fullmatch(expected, failure("generate", prompt, "--quiet"))


def test_a_byte_order_mark_on_stdin_is_no_text(capsys, prompt, monkeypatch):
    outputs = []
    for lines in (b"\xef\xbb\xbfit came late\r\n", b"it came late"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        assert run(["generate", prompt, "--quiet", "--json", "--max-new-tokens", "2"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "PROMPT", "--text", BYTE),
        ("generate", "PROMPT", "--field", f"input={BYTE}"),
        ("generate", "PROMPT", "--text", "x", "--stop-sequences", BYTE),
        ("generate", "PROMPT", "--text", "x", "--task-name", BYTE),
        ("generate", BYTE, "--text", "x"),
        ("evaluate", "PROMPT", "--data", BYTE),
        ("evaluate", "PROMPT", "--data", "DATA", "--input-field", BYTE),
        ("tune", "--train-data", "DATA", "--verbalizer", BYTE + "{{input}}"),
        ("tune", "--train-data", "DATA", "--prompt-tuning-init-method", "TEXT", "--prompt-tuning-init-text", BYTE),
        ("tune", "--train-data", "DATA", "--base-model", BYTE),
        ("tune", "--train-data", f"{BYTE}=DATA", "--train-data", "b=DATA"),
        ("info", BYTE),
    ],
    ids=lambda words: "-".join(words[:1] + words[2:3]),
)
def test_words_of_the_command_line(failure, prompt, tmp_path, words):
    data = written(tmp_path / "rows.jsonl", ROWS)
    words = [word.replace("PROMPT", prompt).replace("DATA", data) for word in words]
    if words[0] == "tune":
        words += ["--output", str(tmp_path / "out"), *QUICK]
    assert r"\udce9" in failure(*words)


@pytest.mark.slow
def test_a_real_process_in_a_latin_1_world(prompt):
    program = [sys.executable, "-c", "from softprompt.cli.main import main; main()"]
    asked = [*program, "generate", prompt, "--quiet"]
    for locale in ("C", "C.UTF-8"):
        env = os.environ | {"LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
        done = subprocess.run(asked, input=b"tea\ncaf\xe9\n", capture_output=True, env=env, check=False)
        assert done.returncode == 2
        assert done.stderr == b"Error: stdin is not UTF-8: byte 0xe9 in line 2; convert the text first\n"
        done = subprocess.run([*asked, "--text", b"caf\xe9"], capture_output=True, env=env, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(b"Error: input 1 holds half of a character")


def test_python_says_which_input(prompt):
    own = load(prompt)
    texts = ["fine", {"input": HALF}]
    expected = re.escape(f"input 2 holds {PLACE}")
    calls = [own, own.classify, own.generate, own.sources]
    with Serving({"own": own}) as serving:
        calls += [lambda given: serving.generate(given, "own"), lambda given: serving.classify(given, "own")]
        for call in calls:
            with pytest.raises(DataError, match=expected):
                call(texts)
    with pytest.raises(DataError, match="half of a character"):
        list(own.stream(HALF))
    with pytest.raises(DataError, match="half of a character"):
        own.classify("x", labels=[HALF, "b"])
    with pytest.raises(ConfigError, match="half of a character"):
        own.generate("x", stop_sequences=[HALF])
    with pytest.raises(DataError, match="record 4: the field 'output' holds half"):
        evaluate(own, broken_rows("output"))


@pytest.mark.parametrize("option", ["input", "output"])
def test_records_in_memory(tmp_path, option):
    with pytest.raises(DataError, match=f"record 4: the field {option!r} holds half of a character"):
        tune(train_data=broken_rows(option), output=tmp_path / "out", num_epochs=1)


@pytest.mark.parametrize("init", ["TEXT", "LABELS"])
def test_initial_texts(prompt, init):
    from softprompt.peft import get_peft_model

    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=2,
        prompt_tuning_init=init,
        prompt_tuning_init_text=HALF,
        tokenizer_name_or_path="demo",
    )
    with pytest.raises(SoftPromptError, match="the initial text holds half of a character"):
        get_peft_model(load(prompt).base.model, config)


def test_nul_is_a_character(capsys, prompt, tmp_path):
    rows = [{**row, "input": row["input"] + "\x00 end"} for row in ROWS]
    data = written(tmp_path / "rows.jsonl", rows)
    table = tmp_path / "rows.csv"
    table.write_text("input,output\n" + "".join(f"{row['input']},{row['output']}\n" for row in rows))
    reports = []
    for path in (data, str(table)):
        assert run(["evaluate", prompt, "--data", path, "--quiet", "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0]["accuracy"] == reports[1]["accuracy"]
    assert len(load(prompt).generate(["a\x00b"], max_new_tokens=1)) == 1


def test_a_file_whose_name_is_not_utf8(failure, prompt, tmp_path):
    data = written(tmp_path / f"{BYTE}.jsonl", ROWS)
    said = failure("tune", "--train-data", data, "--output", str(tmp_path / "out"), *QUICK)
    assert r"the run file cannot keep 'train_data" in said
    assert not (tmp_path / "out").exists()
    assert run(["evaluate", prompt, "--data", data, "--quiet"]) == 0


SHOWN = "café → 🙂"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A prompt whose template has characters that not every terminal can show."""
    folder = tmp_path_factory.mktemp("shown")
    words = ["tune", "--train-data", written(folder / "rows.jsonl", ROWS), "--output", str(folder / "out"), *QUICK]
    assert run([*words, "--verbalizer", SHOWN + " {{input}}"]) == 0
    return str(folder / "out")


@pytest.mark.parametrize("encoding", only(["latin-1"], ["latin-1", "cp1252", "utf-8"]))
def test_output_that_a_terminal_cannot_show_is_escaped(prompt, shown, monkeypatch, encoding):
    """As JSON's escapes, in text and JSON alike; what the encoding has is written as it is."""

    def output(*arguments):
        pipe = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, encoding=encoding))
        assert run(arguments) == 0
        sys.stdout.flush()
        return pipe.getvalue().decode(encoding)

    escaped = SHOWN if encoding == "utf-8" else "café \\u2192 \\ud83d\\ude42"
    assert escaped in output("info", shown)
    assert json.loads(output("info", shown, "--json"))["template"].startswith(SHOWN)
    asked = output("generate", prompt, "--text", SHOWN, "--max-new-tokens", "2", "--preserve-input-text", "--json")
    assert SHOWN in json.dumps(json.loads(asked), ensure_ascii=False)
    assert "é" in asked


@pytest.mark.slow
def test_the_entry_point_under_another_encoding(prompt):
    command = [sys.executable, "-m", "softprompt", "generate", prompt, "--text", "→", "--preserve-input-text"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"\\u2192" in done.stdout
