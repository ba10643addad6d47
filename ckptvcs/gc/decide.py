"""Decide which commits rules drop, before anything is deleted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime

from ckptvcs.errors import InvalidInputError
from ckptvcs.gc.retention import Best, Policy, Row
from ckptvcs.history.catalog import Catalog, Dropped
from ckptvcs.history.commit import Commit
from ckptvcs.history.records import DropRecord
from ckptvcs.history.refs import Refs
from ckptvcs.history.revision import Revisions
from ckptvcs.store.ids import ObjectId

OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class Decision:
    """The decision of gc about one commit.

    Attributes:
        name: The id of the commit.
        commit: The commit.
        action: `keep`, `drop` or `drop optimizer`.
        reasons: The rules that keep the commit, or the reasons of the drop.
        freed_bytes: The bytes that gc deletes, now or after the grace period.
        chained_bytes: The bytes of a dropped commit that are kept, because deltas depend on them.
    """

    name: ObjectId
    commit: Commit
    action: str
    reasons: tuple[str, ...]
    freed_bytes: int = 0
    chained_bytes: int = 0


class Judge:
    """Applies rules to the commits of one repository."""

    def __init__(self, catalog: Catalog, refs: Refs, best: Best | None) -> None:
        """`best` is the rule of the settings for the best commits."""
        self._catalog, self._refs, self._best = catalog, refs, best
        self._revisions = Revisions(catalog, refs)

    def _lines(self, hidden: frozenset[ObjectId]) -> dict[str, list[Row]]:
        """Return the commits of each branch, newest first, then those on no branch by ref."""
        store, lines = self._catalog.store, {}
        seen: set[ObjectId] = set()
        tips = self._revisions.tips()
        for ref in sorted(tips, key=lambda ref: not ref.startswith("heads/")):
            whole = list(self._catalog.noted(self._catalog.ancestors(tips[ref])))
            rows: list[Row] = []
            for age, (name, commit) in enumerate(whole):
                if name in seen and not ref.startswith("heads/"):
                    break  # the rest is on another line
                seen.add(name)
                if name not in hidden:
                    stored = commit.data_bytes + store.home_size(name)
                    ordinal = len(whole) - 1 - age
                    rows.append(Row(name, commit, len(rows), age, ordinal, stored))
            lines[ref] = rows
        return lines

    def decide(
        self, policy: Policy, commits: Mapping[ObjectId, Commit], gone: Dropped, now: datetime
    ) -> list[Decision]:
        """Return a decision on every commit, or nothing without rules."""
        if not policy.drops and policy.optimizer_last is None:
            return []
        known = {name: made for name, made in commits.items() if name not in gone.commits}
        protected = self._protected_from(policy, known)
        lines = list(self._lines(gone.commits).values())
        kept = policy.kept(lines, self._refs.targets("tags"), now)
        if policy.drops and not kept and commits:
            raise InvalidInputError(
                "these rules keep no commit at all", hint="add one, as --keep-last 10"
            )
        old = _old(policy, lines, protected.keys() | kept.keys()) - protected.keys()
        decisions = []
        for name, commit in known.items():
            why = _joined(protected.get(name, ()), kept.get(name, ()))
            stored = commit.parts.keys() - gone.parts.get(name, frozenset())
            if policy.drops and not why:
                decision = Decision(name, commit, "drop", (policy.why_dropped,))
            elif name in old and OPTIMIZER in stored:
                why = (*why, f"optimizer of the last {policy.optimizer_last}")
                decision = Decision(name, commit, "drop optimizer", why)
            else:
                decision = Decision(name, commit, "keep", why)
            decisions.append(decision)
        return decisions

    def _protected_from(
        self, policy: Policy, commits: Mapping[ObjectId, Commit]
    ) -> dict[ObjectId, list[str]]:
        """Return `protected`; named commits lose their branches, which go back before the drop."""
        protected = self.protected(commits)
        for name in policy.named & protected.keys():
            protected[name] = [why for why in protected[name] if not is_followed(why)]
        return protected

    def protected(self, commits: Mapping[ObjectId, Commit]) -> dict[ObjectId, list[str]]:
        """Return why commits stay whole whatever the rules say: refs, and what the settings keep
        of `commits`.
        """
        reasons: dict[ObjectId, list[str]] = {}
        head = self._revisions.head()
        if head is not None:
            reasons[head] = ["HEAD"]
        for ref, name in self._revisions.tips().items():
            space, _, label = ref.partition("/")
            titles = {"heads": f"branch {label}", "tags": f"tag {label}", "pins": "pin"}
            if space in titles:
                reasons.setdefault(name, []).append(titles[space])
        if self._best is not None:
            for name in self._best.pick(self._catalog.noted(commits.items())):
                reasons.setdefault(name, []).append(f"best {self._best.metric}")
        return reasons


def _joined(refs: Iterable[str], rules: Iterable[str]) -> tuple[str, ...]:
    """Return all reasons once; the rule `tag` says nothing beside the name of a tag."""
    why = dict.fromkeys((*refs, *rules))
    if any(reason.startswith("tag ") for reason in why):
        why.pop("tag", None)
    return tuple(why)


def is_followed(reason: str) -> bool:
    """Return whether a reason of `Judge.protected` is a branch, or HEAD."""
    return reason == "HEAD" or reason.startswith("branch ")


def _old(policy: Policy, lines: Iterable[Sequence[Row]], stay: Set[ObjectId]) -> set[ObjectId]:
    """Return the commits that are on no line among the newest that `stay`: their optimizers go."""
    rows, young = set[ObjectId](), set[ObjectId]()
    for line in lines:
        names = [row.name for row in line]
        rows.update(names)
        staying = [name for name in names if not policy.drops or name in stay]
        young.update(staying[: policy.optimizer_last])
    return rows - young


def drop_records(
    rows: Iterable[Decision], policy: Policy, time: str, after: tuple[tuple[str, int], ...]
) -> list[DropRecord]:
    """Return the records of the drops, one for whole commits and one for optimizers."""
    whole = tuple(row.name for row in rows if row.action == "drop")
    parts = tuple(row.name for row in rows if row.action == "drop optimizer")
    drops = [(whole, tuple[str, ...]()), (parts, (OPTIMIZER,))]
    return [
        DropRecord("drop", names, dropped_parts, policy.text, time, after=after)
        for names, dropped_parts in drops
        if names
    ]


def dropped_with(gone: Dropped, rows: Iterable[Decision]) -> Dropped:
    """Return the dropped commits and parts after decisions are carried out."""
    commits, parts = set(gone.commits), dict(gone.parts)
    for row in rows:
        if row.action == "drop":
            commits.add(row.name)
        elif row.action == "drop optimizer":
            parts[row.name] = parts.get(row.name, frozenset()) | {OPTIMIZER}
    return Dropped(frozenset(commits), parts)
