"""Show what an import would do: an estimate for each checkpoint, and the question before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptvcs.cli import entries, render

if TYPE_CHECKING:
    from ckptvcs import Estimate, Forecast, Importer, ImportItem

_MINUTE, _HOUR = 60, 3600  # seconds


def cells(item: ImportItem) -> list[str]:
    """Return the estimated size, ratio and fidelity of a checkpoint that is not committed."""
    row = item.forecast
    if row is None:
        return ["", "", ""]
    size_bytes = _lasting_bytes(row)
    ratio = entries.ratio(item.found.size_bytes, size_bytes)
    return [f"~{render.size(size_bytes)}", f"~{ratio}", _fidelity(row)]


def _lasting_bytes(row: Forecast) -> int:
    return row.stored_bytes + (row.exact_bytes if row.exact_lasts else 0)


def _fidelity(row: Forecast) -> str:
    if row.exact:
        return "exact" if row.exact_lasts else "exact for now"
    return f"near ~{row.weight_rel:.2g}" if row.weight_rel else "weights exact"


def show(importer: Importer, estimate: Estimate | None, *, delete: bool, accept_near: bool) -> None:
    """Print the estimated sizes and the estimated time of an import."""
    if estimate is None:
        if any(item.action == "commit" for item in importer.items):
            render.talk("note: no estimate: no temporary directory has room for two checkpoints")
        return
    raw = sum(item.found.size_bytes for item in importer.items if item.forecast is not None)
    rows = _forecasts(importer)
    stored, patches = sum(map(_lasting_bytes, rows)), _patch_bytes(rows, lasting=True)
    passing = _patch_bytes(rows, lasting=False)
    more = f" + {render.size(passing)} exact for now" if passing else ""
    render.data(f"estimate: {entries.sizes(raw, stored)}{more}, {_time(estimate.seconds)}")
    if delete:
        _show_removals(importer, stored + passing)
    if patches and not accept_near:
        render.talk(
            f"hint: {render.size(patches)} of it are exact patches: --codec lossless may need "
            "less, --accept-near keeps only the newest"
        )
    render.talk(f"the estimate is based on {_names(estimate.sampled)}")


def _forecasts(importer: Importer) -> list[Forecast]:
    return [item.forecast for item in importer.items if item.forecast is not None]


def _patch_bytes(rows: list[Forecast], *, lasting: bool) -> int:
    return sum(row.exact_bytes for row in rows if row.exact_lasts == lasting)


def _show_removals(importer: Importer, stored: int) -> None:
    """Print how many originals would go, and how many bytes that frees."""
    gone = [item for item in importer.items if _goes(item)]
    freed = sum(item.found.size_bytes for item in gone)
    net = freed - stored
    change = f"frees about {render.size(net)}" if net >= 0 else f"adds about {render.size(-net)}"
    what = f"{len(gone)} of {len(importer.items)} originals, {render.size(freed)}"
    render.data(f"would remove {what}: {change}")


def _goes(item: ImportItem) -> bool:
    return not item.problem and item.removal.keep_reason is None


def _names(names: tuple[str, ...]) -> str:
    shown = ", ".join(map(render.printable, names[:2]))
    return shown if len(names) <= 2 else f"{shown} and {len(names) - 2} more"


def _time(seconds: float) -> str:
    if seconds < _MINUTE:
        return f"about {max(1, round(seconds))} s"
    if seconds < _HOUR:
        return f"about {round(seconds / _MINUTE)} min"
    return f"about {seconds / _HOUR:.1f} h"


def question(importer: Importer) -> str | None:
    """Return the question before an import that removes originals; None if none would go."""
    gone = [item for item in importer.items if _goes(item)]
    if not gone:
        return None
    freed = render.size(sum(item.found.size_bytes for item in gone))
    text = f"remove {len(gone)} of {len(importer.items)} originals, {freed}"
    errors = [error for item in gone if (error := _error(importer, item)) is not None]
    if errors:
        worst = f"relative weight error up to {max(errors):.2g}"
        text += f", {len(errors)} of them only near ({worst})"
    new = _forecasts(importer)
    if new:
        stored = sum(row.stored_bytes + row.exact_bytes for row in new)
        text += f"; commit {len(new)}, about {render.size(stored)}"
    return f"{text}?"


def _error(importer: Importer, item: ImportItem) -> float | None:
    """Return the error of the weights if the commit is near, or is going to be near."""
    entry = importer.entry(item)
    if entry is not None:
        return None if entry.exact else entry.commit.error.weight_rel
    row = item.forecast
    return None if row is None or row.exact else row.weight_rel
