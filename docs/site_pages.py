"""What the site has besides the pages in docs/: notebooks, and the pages at the root of the repository.

mkdocs calls the functions ``on_...`` (``hooks`` in mkdocs.yml). A link that leaves docs/ leads to
such a page where there is one, and is plain text otherwise: the site is read without the repository.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "bench/README.md": "bench.md",
    "pretraining/README.md": "pretraining.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the root that exist, and that no line of the navigation names, behind its last part."""
    last = config.nav[-1] if config.nav else {}
    for part in last.values():
        named = json.dumps(config.nav)
        part += [page for path, page in ELSEWHERE.items() if (ROOT / path).exists() and f'"{page}"' not in named]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/, and a page for each notebook."""
    from mkdocs.structure.files import File

    for path, page in ELSEWHERE.items():
        if (ROOT / path).exists():
            text = (ROOT / path).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=relinked(text, path, page)))
    for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        page = f"notebooks/{path.stem}.md"
        text = relinked(page_of(json.loads(path.read_text(encoding="utf-8"))), f"docs/{page}", page)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Mend the links of a page that leave docs/."""
    return relinked(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def relinked(markdown: str, path: str, page: str) -> str:
    """Return the text of the file at ``path`` of the repository with its links as ``page`` of the site has them."""

    def mended(found: re.Match[str]) -> str:
        image, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        there = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if ":" in target or not (ROOT / there).exists():
            return found[0]
        if there.startswith("docs/"):
            there = there.removeprefix("docs/").replace(".ipynb", ".md")
        elif there in ELSEWHERE:
            there = ELSEWHERE[there]
        else:
            return text
        return f"{image}[{text}]({posixpath.relpath(there, posixpath.dirname(page) or '.')}{anchor})"

    return LINK.sub(mended, markdown)


def page_of(notebook: dict[str, Any]) -> str:
    """Return a notebook as Markdown, with the outputs that it holds."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f'<img alt="figure" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">')
            elif said := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f"```text\n{said}\n```")
    return "\n\n".join(parts) + "\n"
