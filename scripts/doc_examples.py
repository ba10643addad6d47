"""Run the examples of the tutorial and the how-to guides, and compare what they print.

python -m scripts.doc_examples          name the examples whose output differs
python -m scripts.doc_examples --write  put the real output into the pages

A `console` block holds commands, each after `$ `, and their output.  A code block with a title is a
file of that name.  `<!-- setup: COMMAND -->` runs a command that readers do not see.  The tutorial
starts in an empty folder, every guide in a copy of the folder that the tutorial ends with.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
TUTORIAL = DOCS / "tutorial.md"
_BLOCK = re.compile(
    r'^<!-- setup: (?P<setup>[^\n]*) -->$|^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n'
    r"(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Example:
    """A command of a page, with the output that the page shows and the real one."""

    command: str
    shown: str
    printed: str
    exact: bool = False

    @property
    def agrees(self) -> bool:
        """Return whether both outputs say the same; ids, numbers and spaces count only if exact."""
        shown, printed = self._compared()
        return shown == printed

    @property
    def difference(self) -> str:
        """Return the differing lines of both outputs, with the lines around them."""
        shown, printed = (output.splitlines() for output in self._compared())
        return "\n".join([*difflib.unified_diff(shown, printed, lineterm="")][2:])

    def _compared(self) -> tuple[str, str]:
        if self.exact:
            return self.shown, self.printed
        return normalize(self.shown), normalize(self.printed)


def guides() -> list[Path]:
    """Return the how-to guides that have examples to run."""
    pages = sorted((DOCS / "howto").glob("*.md"))
    return [page for page in pages if "```console" in page.read_text("utf-8")]


def normalize(output: str) -> str:
    """Replace the parts that vary: ids, numbers except exit codes, and the width of columns."""
    output = re.sub(r"\b([0-9a-f]{2}/)?[0-9a-f]{8,64}\b", "ID", output)
    output = re.sub(r"\b\d+ (s|min|h|d) ago\b", "N ago", output)
    output = re.sub(r"(?<!exit code )-?\d[\d.,]*(e[-+]\d+)?", "N", output)
    output = re.sub(r"[-=]{2,}", "--", output)
    return "\n".join(" ".join(line.split()) for line in output.strip().splitlines())


def run_page(page: Path, folder: Path) -> tuple[list[Example], str]:
    """Run the examples of a page in a folder; return them, and the page with the real outputs."""
    examples: list[Example] = []

    def replace(block: re.Match[str]) -> str:
        if block["setup"]:
            _run(block["setup"], folder, check=True)
        elif block["title"]:
            (folder / block["title"]).write_text(block["body"], "utf-8")
        elif block["language"] == "console":
            ran = [Example(c, o, _run(c, folder)) for c, o in commands(block["body"])]
            examples.extend(ran)
            return f"```console\n{console(ran)}```"
        return block[0]

    return examples, _BLOCK.sub(replace, page.read_text("utf-8"))


def commands(body: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a console block with the output below it."""
    for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def console(examples: Iterable[Example]) -> str:
    """Return the body of a console block with the real outputs."""
    return "".join(f"$ {example.command}\n{example.printed}" for example in examples)


def anonymize(output: str, folder: Path) -> str:
    """Replace the folder and the user of this machine."""
    output = output.replace(str(folder), "/home/you/run")
    return re.sub(r"^by( +)\S+$", r"by\1you@laptop", output, flags=re.MULTILINE)


def _run(command: str, folder: Path, *, check: bool = False) -> str:
    """Run a shell command; return its output and its errors in the order in which they came."""
    environment = {k: v for k, v in os.environ.items() if k != "CKPT_DIR"}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CKPT_CONFIG": f"{folder}-settings.toml",  # not those of the person who runs this
        "COLUMNS": "80",
        "LOGNAME": "you",
        "TZ": "UTC",
        "PYTHONUNBUFFERED": "1",
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if check and done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stdout}")
    return anonymize(done.stdout, folder)


def main() -> int:
    """Run every page, or those that are named; return 1 if an output differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="update the pages")
    parser.add_argument("pages", nargs="*", type=Path, help="guides (default: all)")
    options = parser.parse_args()
    stale = 0
    with tempfile.TemporaryDirectory() as temporary:
        start = Path(temporary) / "tutorial"
        start.mkdir()
        chosen = [page.resolve() for page in options.pages] or guides()
        for page in [TUTORIAL, *(page for page in chosen if page != TUTORIAL)]:
            folder = start
            if page != TUTORIAL:
                folder = Path(temporary) / page.stem
                shutil.copytree(start, folder)
            examples, text = run_page(page, folder)
            differing = [example for example in examples if not example.agrees]
            for example in differing:
                print(f"{page.name}: $ {example.command}\n{example.difference}")
            stale += len(differing)
            if options.write and differing:
                page.write_text(text, "utf-8")
    return 1 if stale and not options.write else 0


if __name__ == "__main__":
    sys.exit(main())
