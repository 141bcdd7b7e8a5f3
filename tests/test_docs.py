"""Every Python block of the documentation runs: those of a page one after another, in one namespace.

``<!-- needs: package>=version ... -->`` in the line before a block skips the page from there on where one is missing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from model_zoos import zoo

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").glob("*.md")) - {ROOT / "docs" / "api.md"})]
BLOCK = re.compile(r"^(?:<!-- needs: (?P<needs>[^\n]*) -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    needs: list[str]
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block((found["needs"] or "").split(), found["code"], text.count("\n", 0, found.start("code")))
        for found in BLOCK.finditer(text)
    ]


def test_every_block_is_found() -> None:
    for page in PAGES:
        text, found = page.read_text(), blocks(page)
        assert text.count("```python") == len(found) > 0, page
        assert text.count("<!-- needs:") == sum(bool(block.needs) for block in found), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        for need in block.needs:
            name, _, version = need.partition(">=")
            if name in ("torchvision", "timm"):
                zoo(name)
            pytest.importorskip(name, minversion=version or None)
        # Lines above, so that a traceback shows the page's own.
        exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
