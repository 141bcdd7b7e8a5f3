"""What mkdocs runs while it builds the pages."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|mod|data):(?=<code>)")


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name the kind of what they refer to; the pages show the name."""
    return _ROLE.sub("", html)
