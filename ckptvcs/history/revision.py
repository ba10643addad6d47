"""Revisions: the names of commits that users type.

2000  step:2000        the step, on HEAD's line first       HEAD  HEAD~3  latest
v1                     a tag                                best:val_loss:min
main  main@2000        a branch; a step on its line         1a2b3c4d  id:1a2b   an id prefix
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Set

from ckptvcs.errors import CorruptionError, InvalidInputError, NotFoundError
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import Commit, find_metrics
from ckptvcs.history.reachability import is_whole, mark, require_packs
from ckptvcs.history.refs import HEAD, LATEST_GOOD, Refs
from ckptvcs.store.ids import Kind, ObjectId

LONGEST_STEP = 19  # digits
_SHORT_ID = 8  # digits of an id, as logs show it
_HEX = re.compile(r"[0-9a-f]{4,64}\Z")
_BACK = re.compile(r"(.+?)~([0-9]{0,9})\Z")
_MAX_LISTED = 6
_WITHIN = re.compile(
    r"(best:[^:]+:(?:min|max)(?:~[0-9]*)?|(?:best|step|id):[^:]+|[^:]+):(.+)\Z", re.DOTALL
)


def split_tensor(text: str) -> tuple[str, str]:
    """Split `REV:TENSOR` into a revision and a tensor name; both may contain colons.

    The revision ends at the first colon that does not belong to its form (`best:loss:min`,
    `step:2000`).

    Raises:
        InvalidInputError: the text has no colon, or one side is empty.
    """
    match = _WITHIN.match(text)
    if match is None:
        raise InvalidInputError(
            f"'{text}' is not a valid REV:TENSOR", hint="use a form like HEAD:model.layers.0.weight"
        )
    return match[1], match[2]


class Revisions:
    """Resolves revisions against the refs and commits of one repository."""

    def __init__(
        self, catalog: Catalog, refs: Refs, newest_good: Callable[[], ObjectId] | None = None
    ) -> None:
        """`newest_good` finds the commit of `latest-good`, which has to be decoded."""
        self._catalog, self._refs, self._newest_good = catalog, refs, newest_good

    def head(self) -> ObjectId | None:
        """Return the commit of HEAD, or None if it has none yet."""
        head = self._refs.read(HEAD)
        if head is None:
            return None
        return self.branch(head.branch) if head.branch else head.commit

    def branch(self, name: str) -> ObjectId | None:
        """Return the newest commit of a branch, if it has one."""
        return self._refs.target(f"heads/{name}")

    def tag(self, name: str) -> ObjectId | None:
        """Return the commit of a tag, if it exists."""
        return self._refs.target(f"tags/{name}")

    def tips(self) -> dict[str, ObjectId]:
        """Return the commit of HEAD and of every branch, tag and pin that has one."""
        tips = {f"heads/{name}": self.branch(name) for name in self._refs.names("heads")}
        tips |= {f"pins/{name}": name for name in self._refs.targets("pins")}
        tips |= {f"tags/{name}": self.tag(name) for name in self._refs.names("tags")}
        tips[HEAD] = self.head()
        return {name: commit for name, commit in tips.items() if commit is not None}

    def whole(self, name: ObjectId) -> bool:
        """Return whether a commit is stored with all of its parts."""
        gone = self._catalog.dropped()
        if not self._catalog.store.contains(name) or name in gone.commits or name in gone.parts:
            return False
        return is_whole(self._catalog, {name: self._catalog.commit(name)}, gone)

    def require(
        self, name: ObjectId, reached: Set[ObjectId] | None = None
    ) -> dict[ObjectId, Commit]:
        """Check that a ref may point to a commit; return its ancestors that no ref reaches yet.

        `reached` is the result of `ids`, to be computed once for many commits.

        Raises:
            NotFoundError: the commit was dropped, or gc deleted it or an ancestor.
        """
        gone = self._catalog.dropped()
        if name in gone.commits:
            raise NotFoundError(f"commit {name[:8]} was dropped", hint="see 'ckpt reflog'")
        reached = self.ids() if reached is None else reached
        commits: dict[ObjectId, Commit] = {}
        below: ObjectId | None = name
        while below is not None and below not in reached:
            if not self._catalog.store.contains(below):
                raise NotFoundError(
                    f"commit {below[:8]} was deleted by gc", hint="see 'ckpt reflog'"
                )
            commits[below] = self._catalog.commit(below)
            below = commits[below].parent
        if not is_whole(self._catalog, commits, gone):
            raise NotFoundError(f"commit {name[:8]} was deleted by gc", hint="see 'ckpt reflog'")
        return commits

    def require_durable(self, name: ObjectId) -> None:
        """Do the same, and check the packs of commits that no ref reaches yet.

        The backend then knows the packs that are not durable yet, for `settle_seen`.

        Raises:
            NotFoundError, MissingObjectError: the commit or one of its packs is missing.
        """
        commits = self.require(name)
        require_packs(self._catalog, mark(self._catalog, commits, self._catalog.dropped()))

    def leads(self, ref: str, name: ObjectId, lines: dict[ObjectId, Set[ObjectId]]) -> bool:
        """Return whether the newest version of a ref reaches a commit; HEAD only when detached.

        `lines` caches the ancestors of each tip.
        """
        tip = self._refs.target(ref)
        if tip is None:
            return False
        if tip not in lines:
            lines[tip] = frozenset(self._catalog.ids_below(tip))
        return name in lines[tip]

    def ids(self) -> set[ObjectId]:
        """Return the ids of all reachable commits, dropped ones too."""
        return self._catalog.with_ancestors(self.tips().values())

    def commits(self) -> dict[ObjectId, Commit]:
        """Return all reachable commits, dropped ones too, children before parents."""
        return dict(self.reachable(sorted(self.tips().values())))

    def unreachable(self, names: Set[ObjectId]) -> list[ObjectId]:
        """Return those of some commits that no readable version of a ref reaches.

        An interrupted commit leaves one, or the version of a ref was lost.
        """
        reached: set[ObjectId] = set()
        for ref in self._refs.every() if names else ():
            for move in self._refs.readable(ref):
                with contextlib.suppress(CorruptionError):
                    self._catalog.add_ids_below(move.commit, reached)
        return sorted(names - reached)

    def lost_lines(self) -> list[ObjectId]:
        """Return the tips of unreachable lines of at least two commits: their ref is lost.

        A single unreachable commit may come from an interrupted commit, and a dropped one from an
        interrupted fetch.

        Raises:
            CorruptionError: a ref is unreadable or a commit is missing.
        """
        unreachable = self.unreachable(set(self._catalog.store.ids(Kind.COMMIT)) - self.ids())
        above = {name: self._catalog.commit(name).parents[:1] for name in unreachable}
        under = {name for parents in above.values() for name in parents}
        return [
            name
            for name in unreachable
            if name not in under
            and name not in self._catalog.dropped().commits
            and under.intersection(unreachable)
            and set(above[name]).intersection(unreachable)
        ]

    def visible(self) -> dict[ObjectId, Commit]:
        """Return all reachable commits that were not dropped."""
        hidden = self._catalog.dropped().commits
        return {name: commit for name, commit in self.commits().items() if name not in hidden}

    def reachable(
        self, start: Iterable[ObjectId], stop: Set[ObjectId] = frozenset()
    ) -> Iterator[tuple[ObjectId, Commit]]:
        """Yield every commit reachable from `start` once, children before parents.

        The walk does not enter the commits of `stop`.
        """
        seen = set(stop)
        for tip in start:
            for name, commit in self._catalog.ancestors(tip, stop=seen):
                seen.add(name)
                yield name, commit

    def resolve(self, text: str) -> ObjectId:
        """Return the commit that a revision names.

        Raises:
            NotFoundError: no commit has that name; the hint suggests others.
            InvalidInputError: the name is ambiguous or not valid.
        """
        text = text.strip()
        if not text:
            raise InvalidInputError(
                "the revision is empty", hint="give a step, a branch, a tag, an id or HEAD"
            )
        back = _BACK.match(text)
        if back:
            return self._back(self.resolve(back[1]), int(back[2] or 1), text)
        if text in (HEAD, "latest", "@"):
            return self._require_head()
        if text == LATEST_GOOD and self._newest_good is not None:
            return self._newest_good()
        if (text.isdecimal() and len(text) <= LONGEST_STEP) or text.startswith("step:"):
            return self._step(text)
        if text.startswith("best:"):
            return self._best(text)
        commit = None if text.startswith("id:") else self._named(text)
        commit = commit or self._prefix(text.removeprefix("id:"))
        if commit is None:
            if _HEX.match(text.removeprefix("id:").lower()):
                self.ids()  # a missing commit in the history is the more important error
            raise self._unknown(text)
        return commit

    def _require_head(self) -> ObjectId:
        head = self.head()
        if head is None:
            raise NotFoundError(
                "there are no commits yet", hint="create one with 'ckpt commit PATH -m MESSAGE'"
            )
        return head

    def _named(self, text: str) -> ObjectId | None:
        at_ref = self.tag(text) or self.branch(text)
        if at_ref is not None:
            return at_ref
        branch, at, step = text.rpartition("@")
        if at and step.isdecimal() and len(step) <= LONGEST_STEP:
            tip = self.head() if branch in (HEAD, "latest") else self.branch(branch)
            if tip is None:
                raise self._unknown(branch)
            commit = self._on_line(tip, int(step))
            if commit is None:
                raise NotFoundError(
                    f"no commit of step {step} on branch '{branch}'",
                    hint=f"run 'ckpt log {branch}' to list its steps",
                )
            return commit
        return None

    def _on_line(self, tip: ObjectId | None, step: int) -> ObjectId | None:
        """Return the newest commit of a step on the line of `tip`."""
        of_step = set(self._catalog.store.find(b"step:%d" % step))
        line = self._catalog.walk(tip) if of_step else ()
        return next((name for name, _ in line if name in of_step), None)

    def _back(self, start: ObjectId, count: int, text: str) -> ObjectId:
        for number, (name, _) in enumerate(self._catalog.walk(start)):
            if number == count:
                return name
        raise NotFoundError(
            f"'{text}' goes back before the first commit",
            hint=f"run 'ckpt log {start[:8]}' to list the commits before it",
        )

    def _step(self, text: str) -> ObjectId:
        digits = text.removeprefix("step:")
        if not digits.isdecimal() or len(digits) > LONGEST_STEP:
            raise InvalidInputError(
                f"'{text}' is not a valid step", hint=f"use digits, at most {LONGEST_STEP}"
            )
        step = int(digits)
        here = self._on_line(self.head(), step)
        if here is not None:
            return here
        of_step = set(self._catalog.store.find(b"step:%d" % step))
        reachable = of_step & self.ids() if of_step else set()
        hidden = self._catalog.dropped().commits & reachable
        commits = sorted(reachable - hidden)
        if len(commits) > 1:
            raise InvalidInputError(
                f"step {step} is ambiguous", hint="use one of " + ", ".join(n[:8] for n in commits)
            )
        if commits:
            return commits[0]
        # A short id may consist of digits only.
        named = self._prefix(text) if len(text) >= _SHORT_ID else None
        if named is None and hidden:
            raise NotFoundError(
                f"step {step} was dropped", hint="see 'ckpt log --all' and 'ckpt reflog'"
            )
        if named is None:
            raise self._no_step(step)
        return named

    def _no_step(self, step: int) -> NotFoundError:
        steps = {commit.step for commit in self.visible().values() if commit.step is not None}
        nearest = sorted(sorted(steps, key=lambda s: abs(s - step))[:_MAX_LISTED])
        hint = (
            f"choose one of the nearest steps: {', '.join(map(str, nearest))}" if nearest else None
        )
        return NotFoundError(f"no commit of step {step}", hint=hint)

    def _best(self, text: str) -> ObjectId:
        metric, colon, way = text.removeprefix("best:").rpartition(":")
        if not colon:
            metric, way = way, "min"
        if not metric or way not in ("min", "max"):
            raise InvalidInputError(
                f"'{text}' is not a valid revision", hint="use best:METRIC:min or best:METRIC:max"
            )
        all_metrics = (
            (self._catalog.merged(name, "", find_metrics(content)).metrics, name)
            for name, content in self._catalog.walk(self.head())
        )
        values = [
            (metrics[metric], name)
            for metrics, name in all_metrics
            if math.isfinite(metrics.get(metric, math.nan))
        ]
        if not values:
            raise NotFoundError(
                f"no commit has the metric '{metric}'",
                hint="run 'ckpt show HEAD' to see the metrics of a commit",
            )
        pick = min if way == "min" else max
        return pick(values, key=lambda pair: pair[0])[1]

    def _prefix(self, text: str) -> ObjectId | None:
        text = text.lower()
        if not _HEX.match(text):
            return None
        names = self._catalog.store.ids(Kind.COMMIT, text)
        if len(names) > 1:
            listed = ", ".join(name[:12] for name in names[:_MAX_LISTED])
            raise InvalidInputError(f"id '{text}' is ambiguous", hint=f"use one of {listed}")
        return names[0] if names else None

    def _unknown(self, text: str) -> NotFoundError:
        names = [
            *self._refs.names("heads"),
            *self._refs.names("tags"),
            "HEAD",
            "latest",
            LATEST_GOOD,
        ]
        names = [name for name in names if name != text]  # the name of a deleted branch
        close = difflib.get_close_matches(text, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "see 'ckpt log --all'"
        return NotFoundError(f"unknown revision '{text}'", hint=hint)
