"""The Python examples of docs/training.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def blocks(trainer: str | None = None) -> list[str]:
    """The examples; those of one of the trainers of others, or those without."""
    found = re.findall(r"(?ms)^```python\n(.*?)^```$", PAGE.read_text("utf-8"))
    used = [re.findall(r"ckptvcs\.integrations\.(\w+)", block) for block in found]
    wanted = [] if trainer is None else [trainer]
    return [block for block, names in zip(found, used, strict=True) if names == wanted]


def run(block: str, names: dict[str, Any]) -> None:
    exec(compile(block, str(PAGE), "exec"), names)
