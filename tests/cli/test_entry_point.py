"""The command line as a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from softprompt.cli.help_page import help_page
from softprompt.cli.main import run

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-c", "from softprompt.cli.main import main; main()"]


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys\nfrom softprompt.cli.main import run\n"
        "assert run(['--help']) == 0 and run(['tune', '--help']) == 0\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.startswith("Usage: softprompt")


def test_the_package_runs_as_a_program():
    command = [sys.executable, "-m", "softprompt", "generat"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "did you mean 'generate'" in done.stderr


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("softprompt ")


def test_the_page_of_the_docs_is_the_help():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == help_page(), "run: python -m softprompt.cli.help_page > docs/cli.md"


def test_a_default_that_is_a_list_is_shown_as_it_is_written():
    words = " ".join(help_page().split())
    assert "[default: x0.1,x0.3,x1,x3]" in words
    assert "[default: (" not in words


def test_ctrl_c_in_a_real_process(tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"input": f"message {i}", "output": ["yes", "no"][i % 2]} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out"
    command = ["tune", "--train-data", str(data), "--output", str(output), "--quiet"]
    process = subprocess.Popen(
        [*PROGRAM, *command, "--num-epochs", "100000", "--num-virtual-tokens", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    log = output / ".state" / "training_logs.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.strip().endswith(f"softprompt tune --resume --output {output}")
