"""History: commits as a log shows them, with what depends on the repository's present state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ckptvcs.errors import InvalidInputError, NotFoundError
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import Commit, ErrorReport
from ckptvcs.history.graph import draw_graph
from ckptvcs.history.refs import HEAD, Refs
from ckptvcs.history.revision import LONGEST_STEP, Revisions
from ckptvcs.history.selection import ALL, Selection
from ckptvcs.store.ids import ObjectId

Bound = str | int | None
"""A bound of a range of commits: a step or a revision; None for no bound."""

Lasting = Callable[[], Mapping[ObjectId, frozenset[str]]]


@dataclass(frozen=True)
class LogEntry:
    """A commit, with properties that depend on the current state of the repository.

    Attributes:
        id: The id of the commit.
        commit: The commit object.
        stored_bytes: The bytes on disk that the commit added, without its exact patch.
        fidelity: The form of each part: `exact`, `near`, `archived` or `dropped`.
        branch: The branch that is shown with the commit.
        tags: The tags of the commit.
        message: The message; the newest note that has one counts.
        metrics: The metrics by name, with those of notes.
        fields: The fields by key, which notes have set.
        exact_bytes: The bytes on disk of its exact patches, which are deleted when it fades.
        exact_lasts: Whether the commit is exact and stays so: it needs no patch, or a tag, a pin
            or the setting `keep-best` keeps its patches.
        near_error: The error of the near form that an archived form replaced; else None.
        between: The commits that an archived commit is interpolated between; empty for an anchor.
    """

    id: ObjectId
    commit: Commit
    stored_bytes: int
    fidelity: Mapping[str, str]
    branch: str | None
    tags: tuple[str, ...]
    message: str
    metrics: Mapping[str, float]
    fields: Mapping[str, str]
    exact_bytes: int = 0
    exact_lasts: bool = True
    near_error: ErrorReport | None = None
    between: tuple[ObjectId, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every file can be restored bit for bit."""
        return all(form == "exact" for form in self.fidelity.values())

    @property
    def step(self) -> int | None:
        """The training step, if it is known."""
        return self.commit.step


def step_of(at: Bound) -> int | None:
    """Return a bound as a step, or None if it is a revision."""
    digits = str(at).removeprefix("step:")
    return int(digits) if digits.isdecimal() and len(digits) <= LONGEST_STEP else None


def _within(step: int | None, low: int | None, high: int | None) -> bool:
    """Return whether a step is in bounds; an unknown step is below every bound."""
    if step is None:
        return low is None
    return (low is None or step >= low) and (high is None or step <= high)


def _matching(
    steps: Iterable[int | None], low: int | None, high: int | None, every: int | None
) -> Iterator[int]:
    """Yield the positions of the steps that are in bounds and multiples of `every`.

    An unknown step has the bounds of the step before it.
    """
    last = None
    for number, step in enumerate(steps):
        last = last if step is None else step
        if _within(last, low, high) and (every is None or (step is not None and step % every == 0)):
            yield number


class History:
    """The commits of one repository."""

    def __init__(
        self, catalog: Catalog, refs: Refs, revisions: Revisions, lasting: Lasting
    ) -> None:
        """`lasting` returns the parts whose exact patches stay, by commit."""
        self._catalog, self._refs, self._revisions = catalog, refs, revisions
        self._lasting = lasting

    def entry(
        self, name: ObjectId, *, branch: str | None = None, tags: tuple[str, ...] = ()
    ) -> LogEntry:
        """Return a commit as the log shows it."""
        return self._entry(name, branch, tags, self._lasting())

    def _entry(
        self,
        name: ObjectId,
        branch: str | None,
        tags: tuple[str, ...],
        lasting: Mapping[ObjectId, frozenset[str]],
    ) -> LogEntry:
        commit = self._catalog.commit(name)
        gone = self._catalog.dropped().parts.get(name, frozenset())
        fidelity = {
            part: "dropped"
            if part in gone
            else "exact"
            if state.exact is None or self._catalog.has_recipe(state.exact)
            else state.fidelity
            for part, state in commit.parts.items()
        }
        is_gone = set(fidelity.values()) == {"dropped"}
        stored = self._catalog.store.home_size(name) + (0 if is_gone else commit.data_bytes)
        form = self._catalog.archived().get(name)
        noted = self._catalog.merged(name, commit.message, commit.metrics)
        patched = [
            (part, state.exact)
            for part, state in commit.parts.items()
            if state.exact is not None and fidelity[part] == "exact"
        ]
        return LogEntry(
            name,
            commit,
            stored,
            fidelity,
            branch,
            tags,
            noted.message,
            noted.metrics,
            noted.fields,
            sum(self._catalog.patch_bytes(exact) for _, exact in patched),
            all(form == "exact" for form in fidelity.values())
            and lasting.get(name, frozenset()).issuperset(part for part, _ in patched),
            None if form is None else self._catalog.original(name).error,
            () if form is None else form.between,
        )

    def errors(self, name: ObjectId) -> dict[int, ErrorReport]:
        """The errors of those tensors of a commit that are not exact, by position in its schema."""
        return self._catalog.errors(name)

    def tags(self) -> dict[ObjectId, tuple[str, ...]]:
        """Return the tags of each tagged commit."""
        tags: dict[ObjectId, tuple[str, ...]] = {}
        for tag in self._refs.names("tags"):
            commit = self._revisions.tag(tag)
            if commit is not None:
                tags[commit] = (*tags.get(commit, ()), tag)
        return tags

    def line(
        self,
        start: Bound = None,
        stop: Bound = None,
        every: int | None = None,
        *,
        revision: str | int | None = None,
    ) -> list[ObjectId]:
        """Return the commits of a first-parent history from `start` to `stop`, oldest first.

        Both bounds are included, dropped commits are not.  A number is a bound for steps and need
        not be the step of a commit; a commit without a step counts as having its predecessor's.
        Any other bound is a revision.  The history is that of `revision`, otherwise of `stop` if
        that is a revision, otherwise of HEAD.  `every` keeps only steps that are a multiple of it.

        Raises:
            NotFoundError: a revision does not exist, or is not in this history.
            InvalidInputError: `every` is below 1, or a revision is ambiguous.
        """
        if every is not None and every < 1:
            raise InvalidInputError(f"invalid interval {every}: it must be at least 1")
        low, high = step_of(start), step_of(stop)
        if revision is None:
            revision = stop if stop is not None and high is None else HEAD
        tip = self._revisions.resolve(str(revision))
        line = list(self._catalog.line(tip))[::-1]
        names = [name for name, _ in line]
        first = 0 if start is None or low is not None else self._position(start, names)
        last = len(names) if stop is None or high is not None else self._position(stop, names) + 1
        matching = _matching((commit.step for _, commit in line), low, high, every)
        return [names[number] for number in matching if first <= number < last]

    def select(self, revisions: Iterable[str | int]) -> list[ObjectId]:
        """Return the commits that revisions and ranges `A..B` name, each once, in their order.

        Raises:
            NotFoundError: a revision does not exist, or a range contains no commit.
            InvalidInputError: a revision is ambiguous.
        """
        names: dict[ObjectId, None] = {}
        for text in map(str, revisions):
            first, dots, last = text.partition("..")
            line = self.line(first or None, last or None) if dots else []
            if dots and not line:
                raise NotFoundError(f"'{text}' contains no commits", hint="see 'ckpt log'")
            names |= dict.fromkeys(line or [self._revisions.resolve(text)])
        return list(names)

    def _position(self, revision: str | int, line: list[ObjectId]) -> int:
        name = self._revisions.resolve(str(revision))
        if name not in line:
            of = f" of {line[-1][:8]}" if line else ""  # empty if all commits were dropped
            raise NotFoundError(
                f"'{revision}' is not on the line{of}", hint="run 'ckpt log REV' to list a line"
            )
        return line.index(name)

    def entries(
        self,
        limit: int | None = None,
        *,
        start: ObjectId | None = None,
        all_branches: bool = False,
        only: Selection = ALL,
    ) -> list[LogEntry]:
        """Commits, newest first: HEAD's line (or that of `start`), or those of all branches.

        Raises:
            NotFoundError: no commit has a metric that `only` needs.
        """
        tags, most = self.tags(), None if only.needs_all else limit
        commits = self._newest_first(most, start=start, all_branches=all_branches)
        lasting = self._lasting()
        entries = (
            self._entry(name, branch, tags.get(name, ()), lasting)
            for name, branch in commits
            if only is ALL or only.wants(name, self._catalog.commit(name))
        )
        return only.pick(entries, limit)

    def graph(
        self, limit: int | None = None, *, start: ObjectId | None = None
    ) -> list[tuple[str, LogEntry | None]]:
        """Return the rows of `draw_graph` for all branches or the history of `start`.

        HEAD's history is in the first column.  `limit` counts commits.
        """
        tags, lasting = self.tags(), self._lasting()
        branches = dict(self._newest_first(start=start, all_branches=True))
        parents = {name: self._catalog.commit(name).parent for name in branches}
        straight = {name for name, _ in self._catalog.ancestors(start or self._revisions.head())}
        rows: list[tuple[str, LogEntry | None]] = []
        for drawn, name in draw_graph(parents, straight):
            if name is None:
                rows.append((drawn, None))
                continue
            if limit == 0:
                break
            limit = None if limit is None else limit - 1
            entry = self._entry(name, branches[name], tags.get(name, ()), lasting)
            rows.append((drawn, entry))
        return rows

    def names(self) -> dict[ObjectId, tuple[str, ...]]:
        """Return the labels of tips, HEAD first: `HEAD -> main`, `side`, `tag: v1`, `pinned`."""
        branch = self._refs.current_branch()
        current = f"heads/{branch}" if branch else HEAD
        labels: dict[ObjectId, list[str]] = {}
        for name, tip in self._revisions.tips().items():
            space, _, short = name.partition("/")
            if name == HEAD:
                shown = HEAD if current == HEAD else f"{HEAD} -> {current[6:]}"
                labels.setdefault(tip, []).insert(0, shown)
            elif name != current:
                shown = {"tags": f"tag: {short}", "pins": "pinned"}.get(space, short)
                labels.setdefault(tip, []).append(shown)
        return {tip: tuple(names) for tip, names in labels.items()}

    def branch_at(self, name: ObjectId) -> str | None:
        """Return a branch whose newest commit this is, preferring HEAD's branch."""
        tips = self._revisions.tips()
        branches = [
            ref[6:] for ref, tip in tips.items() if ref.startswith("heads/") and tip == name
        ]
        following = self._refs.current_branch()
        return following if following in branches else next(iter(branches), None)

    def newer(self, name: ObjectId) -> dict[str, int]:
        """Return the branches that contain a commit, and how many newer commits each has."""
        found = {}
        for ref, tip in self._revisions.tips().items():
            if ref.startswith("heads/"):
                line = (below for below, _ in self._catalog.line(tip))
                number = next((at for at, below in enumerate(line) if below == name), None)
                if number is not None:
                    found[ref[6:]] = number
        return found

    def unnamed(self, start: ObjectId) -> list[ObjectId]:
        """Return a commit and its ancestors that no ref reaches, newest first."""
        named = self._revisions.ids()
        return [name for name, _ in self._catalog.ancestors(start) if name not in named]

    def newest_first(self) -> list[ObjectId]:
        """Return the commits of all branches, dropped ones too, children before parents."""
        return [name for name, _ in self._newest_first(start=None, all_branches=True)]

    def _newest_first(
        self, limit: int | None = None, *, start: ObjectId | None, all_branches: bool
    ) -> list[tuple[ObjectId, str | None]]:
        """Return commits and the branch that each was found on; `limit` counts if only one line."""
        if start is not None:
            lines = [(self.branch_at(start), start)]
        else:
            lines = self._lines(all_branches=all_branches)
        walk = self._catalog.ancestors if all_branches else self._catalog.line
        branches: dict[ObjectId, str | None] = {}
        times: dict[ObjectId, str] = {}
        for branch, tip in lines:
            line = []
            for name, commit in walk(tip):
                if name in branches or (len(lines) == 1 and len(branches) == limit):
                    break
                branches[name] = branch
                line.append((name, commit))
            for name, commit in reversed(line):
                # Clocks can be wrong: a commit never counts as older than its parent.
                below = times.get(commit.parent, "") if commit.parent else ""
                times[name] = max(commit.time, below)
        names = list(branches)
        if len(lines) > 1:
            names.sort(key=lambda name: times[name], reverse=True)
        return [(name, branches[name]) for name in names]

    def _lines(self, *, all_branches: bool) -> list[tuple[str | None, ObjectId]]:
        """Return (branch, tip) of HEAD, followed with `all_branches` by those of all refs."""
        lines: list[tuple[str | None, ObjectId]] = []
        head = self._revisions.head()
        if head is not None:
            lines.append((self._refs.current_branch(), head))
        if all_branches:
            tips = self._revisions.tips()
            lines += [(n[6:], tip) for n, tip in tips.items() if n.startswith("heads/")]
            lines += [(None, tip) for n, tip in tips.items() if not n.startswith("heads/")]
        return lines
