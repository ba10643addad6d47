"""What a user types -> one commit.

2000  step:2000        the step, on HEAD's line first       HEAD  HEAD~3  latest
v1                     a tag                                best:val_loss:min
main  main@2000        a branch; a step on its line         1a2b3c4d  id:1a2b   an id prefix
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
from collections.abc import Iterable, Iterator, Set

from ckptvcs.errors import CorruptionError, InvalidInputError, NotFoundError
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import Commit, find_metrics
from ckptvcs.history.reachability import is_whole, mark, require_packs
from ckptvcs.history.refs import HEAD, Refs
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
    """`REV:TENSOR` as a revision and the name of a tensor, either of which may hold colons.

    The revision ends at the first colon that its form does not need itself, as `best:loss:min` and
    `step:2000` do; all that follows is the name.

    Raises:
        InvalidInputError: there is no colon, or nothing on one side of it.
    """
    found = _WITHIN.match(text)
    if found is None:
        raise InvalidInputError(
            f"'{text}' is no REV:TENSOR", hint="for example HEAD:model.layers.0.weight"
        )
    return found[1], found[2]


class Revisions:
    """Resolves revisions against the refs and commits of one repository."""

    def __init__(self, catalog: Catalog, refs: Refs) -> None:
        self._catalog, self._refs = catalog, refs

    def head(self) -> ObjectId | None:
        """The commit that HEAD is at; None where there is none yet."""
        state = self._refs.read(HEAD)
        if state is None:
            return None
        return self.branch(state.branch) if state.branch else state.commit

    def branch(self, name: str) -> ObjectId | None:
        """The newest commit of a branch."""
        state = self._refs.read(f"heads/{name}")
        return state.commit if state else None

    def tag(self, name: str) -> ObjectId | None:
        """The commit of a tag."""
        state = self._refs.read(f"tags/{name}")
        return state.commit if state else None

    def tips(self) -> dict[str, ObjectId]:
        """Every branch, tag, pin and a detached HEAD that is at a commit."""
        found = {f"heads/{name}": self.branch(name) for name in self._refs.names("heads")}
        found |= {f"pins/{name}": name for name in self._refs.targets("pins")}
        found |= {f"tags/{name}": self.tag(name) for name in self._refs.names("tags")}
        found[HEAD] = self.head()
        return {name: commit for name, commit in found.items() if commit is not None}

    def whole(self, name: ObjectId) -> bool:
        """Whether a commit is there with all of its parts."""
        gone = self._catalog.dropped()
        if not self._catalog.store.contains(name) or name in gone.commits or name in gone.parts:
            return False
        return is_whole(self._catalog, {name: self._catalog.commit(name)}, gone)

    def require(
        self, name: ObjectId, reached: Set[ObjectId] | None = None
    ) -> dict[ObjectId, Commit]:
        """Refuse to lead to a commit that rules or a sweep took away, or that stands on such.
        `reached` is what `ids` gives, where it is asked for many.  The commits that no ref leads
        to, down from this one.

        Raises:
            NotFoundError: it is one.
        """
        gone = self._catalog.dropped()
        if name in gone.commits:
            raise NotFoundError(f"commit {name[:8]} was dropped", hint="see 'ckpt reflog'")
        reached = self.ids() if reached is None else reached
        commits: dict[ObjectId, Commit] = {}
        below: ObjectId | None = name
        while below is not None and below not in reached:
            if not self._catalog.store.contains(below):
                raise NotFoundError(f"commit {below[:8]} was swept", hint="see 'ckpt reflog'")
            commits[below] = self._catalog.commit(below)
            below = next(iter(commits[below].parents), None)
        if not is_whole(self._catalog, commits, gone):
            raise NotFoundError(f"commit {name[:8]} was swept", hint="see 'ckpt reflog'")
        return commits

    def require_durable(self, name: ObjectId) -> None:
        """The same, for who is about to lead to it: where no ref did so before, the packs that it
        stands on are looked at, so that those which are not durable yet are known.

        Raises:
            NotFoundError, MissingObjectError: it is not there any more.
        """
        commits = self.require(name)
        require_packs(self._catalog, mark(self._catalog, commits, self._catalog.dropped()))

    def leads(self, ref: str, name: ObjectId, lines: dict[ObjectId, Set[ObjectId]]) -> bool:
        """Whether a ref leads to a commit by itself, as it is now: HEAD only where it follows no
        branch.  `lines` keeps what is below each commit that a ref was at.
        """
        state = self._refs.read(ref)
        tip = state.commit if state else None
        if tip is None:
            return False
        if tip not in lines:
            lines[tip] = frozenset(self._catalog.ids_below(tip))
        return name in lines[tip]

    def ids(self) -> set[ObjectId]:
        """Every commit that a ref leads to, dropped ones too."""
        found: set[ObjectId] = set()
        for tip in self.tips().values():
            for name in self._catalog.ids_below(tip):
                if name in found:
                    break
                found.add(name)
        return found

    def commits(self) -> dict[ObjectId, Commit]:
        """Every commit that a ref leads to, dropped ones too, children before parents along every
        line.
        """
        return dict(self.reachable(sorted(self.tips().values())))

    def loose(self, names: Set[ObjectId]) -> list[ObjectId]:
        """Those of some commits that no generation of a ref leads to, as far as those can be read:
        they came to nothing, or their generation was lost.
        """
        led: set[ObjectId] = set()
        for ref in self._refs.every() if names else ():
            for move in self._refs.readable(ref):
                with contextlib.suppress(CorruptionError):
                    for name in self._catalog.ids_below(move.commit):
                        if name in led:
                            break
                        led.add(name)
        return sorted(names - led)

    def lost_lines(self) -> list[ObjectId]:
        """The ends of lines of two and more commits that no generation of a ref ever led to.  One
        may have come to nothing; what another stands on was led to, by a ref that is lost.

        Raises:
            CorruptionError: a ref is unreadable, or a commit is lost.
        """
        loose = self.loose(set(self._catalog.store.ids(Kind.COMMIT)) - self.ids())
        above = {name: self._catalog.commit(name).parents[:1] for name in loose}
        under = {name for parents in above.values() for name in parents}
        return [
            name
            for name in loose
            if name not in under
            and under.intersection(loose)
            and set(above[name]).intersection(loose)
        ]

    def visible(self) -> dict[ObjectId, Commit]:
        """The same without those that were dropped."""
        hidden = self._catalog.dropped().commits
        return {name: made for name, made in self.commits().items() if name not in hidden}

    def reachable(
        self, start: Iterable[ObjectId], known: Set[ObjectId] = frozenset()
    ) -> Iterator[tuple[ObjectId, Commit]]:
        """Every commit that can be reached from `start`, each once, children before parents
        along every line; not those that are `known`, nor what only these lead to.
        """
        seen: set[ObjectId] = set()
        for tip in start:
            stack = [tip]
            while stack:
                name = stack.pop()
                if name in seen or name in known:
                    continue
                seen.add(name)
                commit = self._catalog.commit(name)
                yield name, commit
                stack.extend(commit.parents)

    def resolve(self, text: str) -> ObjectId:
        """The commit that `text` names.

        Raises:
            NotFoundError: nothing has that name; the hint suggests some that exist.
            InvalidInputError: it names several commits, which the hint lists.
        """
        text = text.strip()
        if not text:
            raise InvalidInputError("an empty revision names nothing")
        back = _BACK.match(text)
        if back:
            return self._back(self.resolve(back[1]), int(back[2] or 1), text)
        if text in (HEAD, "latest", "@"):
            head = self.head()
            if head is None:
                raise NotFoundError("there are no commits yet", hint="ckpt commit PATH -m MESSAGE")
            return head
        if (text.isdecimal() and len(text) <= LONGEST_STEP) or text.startswith("step:"):
            return self._step(text)
        if text.startswith("best:"):
            return self._best(text)
        found = None if text.startswith("id:") else self._named(text)
        found = found or self._prefix(text.removeprefix("id:"))
        if found is None:
            if _HEX.match(text.removeprefix("id:").lower()):
                self.ids()  # where a commit of the history is lost, that is what there is to say
            raise self._unknown(text)
        return found

    def _named(self, text: str) -> ObjectId | None:
        at_ref = self.tag(text) or self.branch(text)
        if at_ref is not None:
            return at_ref
        branch, at, step = text.rpartition("@")
        if at and step.isdecimal() and len(step) <= LONGEST_STEP:
            tip = self.branch(branch)
            if tip is None:
                raise self._unknown(branch)
            found = self._on_line(tip, int(step))
            if found is None:
                raise NotFoundError(f"no commit of step {step} on branch '{branch}'")
            return found
        return None

    def _on_line(self, tip: ObjectId | None, step: int) -> ObjectId | None:
        """The newest commit of a step among a commit and its ancestors."""
        known = set(self._catalog.store.find(b"step:%d" % step))
        return next((n for n, _ in self._catalog.walk(tip) if n in known), None) if known else None

    def _back(self, start: ObjectId, count: int, text: str) -> ObjectId:
        for number, (name, _) in enumerate(self._catalog.walk(start)):
            if number == count:
                return name
        raise NotFoundError(f"'{text}' goes back before the first commit")

    def _step(self, text: str) -> ObjectId:
        digits = text.removeprefix("step:")
        if not digits.isdecimal() or len(digits) > LONGEST_STEP:
            raise InvalidInputError(f"'{text}' is no step")
        step = int(digits)
        here = self._on_line(self.head(), step)
        if here is not None:
            return here
        known = set(self._catalog.store.find(b"step:%d" % step))
        there = known & self.ids() if known else set()
        hidden = self._catalog.dropped().commits & there
        found = sorted(there - hidden)
        if len(found) > 1:
            raise InvalidInputError(
                f"step {step} is ambiguous", hint="one of " + ", ".join(n[:8] for n in found)
            )
        if found:
            return found[0]
        # The short id that a log shows may have no letter in it.
        named = self._prefix(text) if len(text) >= _SHORT_ID else None
        if named is None and hidden:
            raise NotFoundError(
                f"step {step} was dropped", hint="'ckpt log --all' and 'ckpt reflog' say by what"
            )
        if named is None:
            raise self._no_step(step)
        return named

    def _no_step(self, step: int) -> NotFoundError:
        steps = {made.step for made in self.visible().values() if made.step is not None}
        nearest = sorted(sorted(steps, key=lambda s: abs(s - step))[:_MAX_LISTED])
        hint = f"nearest steps: {', '.join(map(str, nearest))}" if nearest else None
        return NotFoundError(f"no commit of step {step}", hint=hint)

    def _best(self, text: str) -> ObjectId:
        _, metric, *rest = text.split(":")
        way = rest[0] if rest else "min"
        if not metric or len(rest) > 1 or way not in ("min", "max"):
            raise InvalidInputError(f"'{text}' is no best:METRIC:min or best:METRIC:max")
        found = (
            (find_metrics(content).get(metric, math.nan), name)
            for name, content in self._catalog.walk(self.head())
        )
        values = [pair for pair in found if math.isfinite(pair[0])]
        if not values:
            raise NotFoundError(f"no commit has the metric '{metric}'")
        pick = min if way == "min" else max
        return pick(values, key=lambda pair: pair[0])[1]

    def _prefix(self, text: str) -> ObjectId | None:
        text = text.lower()
        if not _HEX.match(text):
            return None
        found = self._catalog.store.ids(Kind.COMMIT, text)
        if len(found) > 1:
            listed = ", ".join(name[:12] for name in found[:_MAX_LISTED])
            raise InvalidInputError(f"id '{text}' is ambiguous", hint=f"one of {listed}")
        return found[0] if found else None

    def _unknown(self, text: str) -> NotFoundError:
        names = [*self._refs.names("heads"), *self._refs.names("tags"), "HEAD", "latest"]
        close = difflib.get_close_matches(text, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "see 'ckpt log --all'"
        return NotFoundError(f"unknown revision '{text}'", hint=hint)
