"""A table of all optimizers in all layouts: how small a commit is, and what is lost with it.

python -m tests.corpus [--optimizer NAME ...] [--layout NAME ...] [--codec CODEC]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from tests.corpus.outcome import Outcome, pairs, try_out

_HEAD = (
    f"{'optimizer':24}{'layout':22}{'ratio':>7}  {'state':6}{'said':>7}{'true':>8}{'said':>8}"
    f"{'worst':>8}{'gap':>9}{'error':>8}  faults"
)


def _row(optimizer: str, layout: str, found: Outcome) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    state = "exact" if found.exact else "near"
    return (
        f"{optimizer:24}{layout:22}{found.ratio:7.1f}  {state:6}{number(found.recorded):>7}"
        f"{number(found.update):>8}{number(found.recorded_worst):>8}{number(found.worst):>8}"
        f"{number(found.gap):>9}"
        f"{number(found.error):>8}  {'; '.join(found.faults)}"
    )


def main() -> int:
    """Print a row for each optimizer and layout; 1 where one has faults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimizer", action="append", help="a glob")
    parser.add_argument("--layout", action="append", help="a glob")
    parser.add_argument("--codec", default="near")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("CKPT_COMPILED", "0")
    bad = total = 0
    sys.stdout.write(_HEAD + "\n")
    for optimizer, layout in pairs():
        if not any(fnmatchcase(optimizer, glob) for glob in options.optimizer or ["*"]):
            continue
        if not any(fnmatchcase(layout, glob) for glob in options.layout or ["*"]):
            continue
        with tempfile.TemporaryDirectory(prefix="ckpt-corpus-") as folder:
            try:
                found = try_out(optimizer, layout, Path(folder), options.codec)
            except Exception as error:
                found = Outcome(0.0, False)
                found.faults.append(f"{type(error).__name__}: {error}".partition("\n")[0])
        total, bad = total + 1, bad + bool(found.faults)
        sys.stdout.write(_row(optimizer, layout, found) + "\n")
        sys.stdout.flush()
    sys.stdout.write(f"{bad} of {total} have faults\n")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
