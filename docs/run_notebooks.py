"""Run notebooks and keep what they print: ``python docs/run_notebooks.py [FILE...]``, by default all there are.

No kernel is needed: a cell is plain Python, its last expression is its result, and figures become PNGs.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parent / "notebooks"


def outputs_of(source: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """Run a cell in a namespace and return its outputs, as a notebook has them."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(ast.Module(body, []), f"cell {number}", "exec"), names)  # noqa: S102 (our own notebooks)
        found = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names) if last else None
    outputs = []
    if printed.getvalue():
        text = printed.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": text})
    if found is not None:
        data = {"text/plain": repr(found).splitlines(keepends=True)}
        if hasattr(found, "savefig"):
            picture = io.BytesIO()
            found.savefig(picture, format="png", dpi=70)
            data["image/png"] = base64.b64encode(picture.getvalue()).decode()
        result = {"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"}
        outputs.append(result)
    return outputs


def run(notebook: dict[str, Any]) -> None:
    """Run all cells in order, in the working directory, and put their outputs into the notebook."""
    names: dict[str, Any] = {}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, start=1):
        cell["outputs"] = outputs_of("".join(cell["source"]), names, number)
        cell["execution_count"] = number


if __name__ == "__main__":
    for path in [Path(each).resolve() for each in sys.argv[1:]] or sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            run(notebook)
            os.chdir(NOTEBOOKS)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
