"""Conventions: what trainers call their files, directories and keys, and what these names say.

A number in a name counts what the word at it says (`ep0-ba200-rank0`: an epoch, a step, a rank).  A
number without such a word is a step only where it can hardly be anything else.  `together.py` and
`alike.py` build on this; nothing here reads a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from itertools import pairwise
from typing import Any

# -- names of files --------------------------------------------------------------------------------

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
"""How the names of checkpoint files usually end."""

TAKEN_SUFFIXES = (*SUFFIXES, ".tar", ".th", ".pyth", ".torch")
"""How the names of files end that an import looks into: `.tar` is for `model.pth.tar`."""

TEMPORARY = re.compile(r"\..*|tmp[-_].*|.*\.(tmp|temp|part|partial)|.*~", re.IGNORECASE)
"""Entries of a folder that are hidden, or not finished."""

PIECE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)"
    r"|.*-[0-9]+-of-[0-9]+\.[a-z]+|.*\.distcp"
)
"""Files that are part of a checkpoint, and none by themselves."""

PIECE_OF_ONE = re.compile(
    r"optimizer\.(bin|pt|pth)|\.metadata|.*\.distcp|(.*_)?mp_rank_[0-9_]+_(model|optim)_states\.pt"
    r"|model_optim_rng\.pt|(model|optim)_world_size_[0-9]+_rank_[0-9]+\.pt"
)
"""Files that show that the folder they stand in is one checkpoint."""

FOLDER_OF_ONE = re.compile(r"(mp|tp)_rank_[0-9]+(_.*)?")
"""Folders that show the same: Megatron has one for each process."""

INCOMPLETE = "checkpoint-is-incomplete.txt"
"""A file of Lightning that says that the directory it stands in is not finished."""

HF_FIRST, HF_LAST = "training_args.bin", "trainer_state.json"
"""What the Trainer of Hugging Face writes first into a checkpoint, and what it writes last."""

LIGHTNING_LAST = re.compile(r"last(-v[0-9]+)?\.ckpt")
"""What Lightning calls the newest checkpoint, which it writes besides one of another name."""


def stem(name: str) -> str:
    """A name without the endings of a checkpoint file: `model` for `model.pth.tar`."""
    while name.lower().endswith(TAKEN_SUFFIXES) and name.rindex("."):
        name = name[: name.rindex(".")]
    return name


# -- keys of a checkpoint --------------------------------------------------------------------------

PART_KEYS = frozenset({
    "model", "state_dict", "model_state_dict", "module", "net", "network", "optimizer",
    "optimizer_state_dict", "optim",
})  # fmt: skip
"""Keys at the top of a checkpoint that hold a whole part."""

_STEP_KEYS = (
    ("step",), ("global_step",), ("iteration",), ("iter",), ("steps",), ("current_step",),
    ("global_steps",),  # DeepSpeed
    ("iter_num",),  # nanoGPT
    ("num_updates",), ("optimizer_history", -1, "num_updates"),  # fairseq
    ("meta", "iter"),  # mmengine
    ("state", "timestamp", "batch"), ("state", "timestamp", "Timestamp", "batch"),  # composer
    ("train_state", "step"), ("trainer_state", "global_step"),
)  # fmt: skip
_EPOCH_KEYS = (
    ("epoch",), ("current_epoch",), ("meta", "epoch"), ("extra_state", "train_iterator", "epoch"),
    ("state", "timestamp", "epoch"), ("state", "timestamp", "Timestamp", "epoch"),
)  # fmt: skip
_STATE_FILES = {HF_LAST: "global_step", "metadata.json": "step", "meta.json": "step"}
_STEP_FILES = frozenset({"latest", "latest_checkpointed_iteration.txt"})  # DeepSpeed, Megatron
_OTHER_STEPS = "random_states"  # of accelerate: their step counts gradients that are accumulated


def may_hold_step(path: str) -> bool:
    """Whether a file may say the step of its checkpoint by a key at its top."""
    return not path.rpartition("/")[2].startswith(_OTHER_STEPS)


def step_key_of(path: str) -> str | None:
    """The key of a JSON file beside the tensors that holds the step; None for other files."""
    return _STATE_FILES.get(path.rpartition("/")[2])


def is_step_file(path: str) -> bool:
    """Whether a file at the top of a checkpoint holds the name, or number, of a step alone."""
    return path in _STEP_FILES


def step_in_keys(tree: object) -> int | None:
    """The step that a checkpoint gives under one of the usual keys."""
    return next(filter(_is_count, (_at(tree, path) for path in _STEP_KEYS)), None)


def epoch_in_keys(tree: object) -> int | None:
    """The epoch that a checkpoint gives under one of the usual keys."""
    return next(filter(_is_count, (_at(tree, path) for path in _EPOCH_KEYS)), None)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _at(tree: object, path: Sequence[str | int]) -> Any:
    node: Any = tree
    for key in path:
        if isinstance(node, dict) and isinstance(key, str):
            node = node.get(key)
        elif isinstance(node, list) and isinstance(key, int) and node:
            node = node[key]
        else:
            return None
    return node


# -- files beside each other -----------------------------------------------------------------------

ALIAS = re.compile(r"(?<![A-Za-z])(best|last|latest|final|newest)(?![A-Za-z])", re.IGNORECASE)
"""What stands in a name where others have a step; the file is written again and again."""

COMPANION = re.compile(
    r"(?<![A-Za-z])(?:net[-_]?[gd]|extra[-_]states?|(?:model|optim(?:izer)?|training)[-_]states?"
    r"|ema(?:[-_]0\.[0-9]+)?|models?|net|network|weights|params|optim(?:izer)?s?|opt|scheduler"
    r"|sched|scaler|trainer|generator|discriminator|actor|critic|policy|stats"
    r"|\A[gd](?=[-_][0-9])|\Aepoch(?=[-_][0-9]))(?![A-Za-z])",
    re.IGNORECASE,
)
"""What tells the files of one step from each other: `ema_0.9999_010000.pt` and `opt010000.pt`."""

SHARD_COUNT = re.compile(
    r"\*[-_]?of[-_]?([0-9]{1,9})|world[-_]?size[-_]?([0-9]{1,9})", re.IGNORECASE
)
"""Where a name (with `*` for its own number) says how many shards there are."""

SHARED = "-shared-"
"""What fairseq writes in the place of `-rank-0-` where all ranks have the same."""


# -- numbers in names ------------------------------------------------------------------------------


class Kind(Enum):
    """What a number in a name counts."""

    STEP = auto()  # step-1000, iter_20000, ep0-ba200, 10000_steps
    CHECKPOINT = auto()  # checkpoint-500, ckpt_356, and 182000 in checkpoint_6_182000
    ATTACHED = auto()  # checkpoint500: some trainers count epochs so
    NUMBER = auto()  # model-500, opt010000, 1000
    LOOSE = auto()  # myrun_1000
    EPOCH = auto()
    SHARD = auto()  # a rank, a part, a shard
    OTHER = auto()  # a seed, a size, a version, a date


@dataclass(frozen=True)
class Number:
    """A number in a name, where it stands there, and what it counts."""

    start: int
    end: int
    value: int
    kind: Kind

    @property
    def digits(self) -> int:
        """How many digits it is written with."""
        return self.end - self.start

    @property
    def is_sure(self) -> bool:
        """Whether it is a step, whatever else is known."""
        padded = self.kind in (Kind.NUMBER, Kind.ATTACHED) and self.digits >= _PADDED
        return self.kind in (Kind.STEP, Kind.CHECKPOINT) or padded


_LONGEST = 4096  # characters; file systems have no longer names
_PADDED = 6  # digits: model_0004999.pth of detectron2, model010000.pt of guided diffusion

_STEP_ENDS = (
    "step", "steps", "iter", "iters", "iteration", "iterations", "update", "updates",
)  # fmt: skip
_STEP_WORDS = frozenset({"it", "itr", "ba"})
_EPOCH_WORDS = frozenset({"ep", "e", "phase", "round", "rounds"})
_CHECKPOINT_ENDS = ("checkpoint", "checkpoints", "ckpt", "chkpt")
_SHARD_WORDS = frozenset({
    "rank", "ranks", "shard", "shards", "part", "parts", "partition", "worker", "process", "proc",
    "node", "gpu", "device", "split", "chunk", "piece", "slice", "tp", "pp", "dp", "mp", "cp",
    "fsdp", "zero", "consolidated", "expert", "experts", "layer",
})  # fmt: skip
_PLAIN_WORDS = frozenset({
    "model", "models", "net", "network", "weight", "weights", "param", "params", "state", "states",
    "opt", "optim", "optimizer", "ema", "unet", "module", "snapshot", "save", "saved", "backup",
    "training", "train", "trainer", "scheduler", "g", "d", "gen", "disc", "generator",
    "discriminator", "netg", "netd", "actor", "critic", "policy", "value", "agent",
})  # fmt: skip
_OTHER_WORDS = frozenset({
    "epochstep", "epochsteps", "seed", "fold", "run", "trial", "exp", "experiment", "job", "id",
    "task", "version", "v", "lr", "bs", "b", "k", "x", "batch", "size", "dim", "hidden", "layers",
    "heads", "width", "depth", "res", "resolution", "patch", "window", "px", "len", "length", "ctx",
    "context", "seq", "tokens", "token", "samples", "sample", "vocab", "top", "loss", "acc",
    "accuracy", "score", "reward", "return", "bleu", "wer", "cer", "map", "miou", "psnr", "fid",
    "stage", "ingredient", "level", "fp", "bf", "int", "float", "uint", "bit", "bits", "q", "alpha",
    "beta", "temp", "time", "copy", "group", "config", "cfg", "h", "r",
})  # fmt: skip
_SIZES = frozenset({"b", "m", "mb", "gb", "bt", "mt", "t", "tb", "tokens", "px", "bit", "bits"})
_MULTIPLES = {"k": 1_000, "m": 1_000_000}
_UNITS = _SIZES | {*_MULTIPLES, "step", "steps", "iter", "iters", "epoch", "epochs", "x"}
_ARCHITECTURES = (
    "resnet", "resnext", "densenet", "vgg", "vit", "swin", "deit", "beit", "convnext",
    "efficientnet", "mobilenet", "inception", "regnet", "unet", "clip", "dino", "imagenet",
    "llama", "gpt", "bert", "qwen", "mistral", "stylegan", "diffusion",
)  # fmt: skip

_TOKENS = re.compile(
    r"(?P<bar>\0+)|(?P<decimal>[0-9]+(?:\.[0-9]+)+)|(?P<number>[0-9]+)|(?P<word>[^\W\d_]+)"
    r"|(?P<gap>(?:[^\w\0]|_)+)"
)
_OF = re.compile(r"(?<![0-9])([0-9]{1,18}|\*)([-_]?of[-_]?)([0-9]{1,18})(?![0-9])", re.IGNORECASE)
_DATE = re.compile(
    r"(?<![0-9A-Za-z])(?:19|20)[0-9]{2}([-_.]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12][0-9]|3[01])"
    r"(?![0-9])(?:[-_T+ .]?[0-9]{2}([-_:h.]?)[0-9]{2}(?:\2[0-9]{2})?(?![0-9])(?:\+[0-9]{2})?)?"
)
_STEP_BEFORE = re.compile(rf"(?:{'|'.join(_STEP_ENDS)})[-_=.:]?\Z", re.IGNORECASE)
_MASKED = (
    re.compile(r"(?<![0-9a-f])[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?![0-9a-f])", re.I),
    re.compile(  # hashes: digits and letters change more than once
        r"(?<![0-9A-Za-z])(?=[0-9a-f]*?(?:[a-f][0-9]+[a-f]|[0-9][a-f]+[0-9]))[0-9a-f]{6,64}"
        r"(?![0-9A-Za-z])",
        re.I,
    ),
    re.compile(r"(?<![0-9.])[0-9]+(?:\.[0-9]+)?e[-+][0-9]+(?![0-9A-Za-z])", re.I),  # 1e-4
    re.compile(  # v1-5, version_2
        r"(?<![A-Za-z])v(?:er(?:sion)?)?[-_.]?[0-9]+(?:[-_.][0-9]{1,2}(?![0-9]))*", re.I
    ),
    re.compile(r"\([0-9]+\)"),  # model (1).pt
)


def _masked(name: str) -> str:
    """The name with NUL in the place of hashes, versions, dates and copies' numbers."""
    for pattern in _MASKED:
        name = pattern.sub(lambda found: "\0" * len(found[0]), name)
    for found in _DATE.finditer(name):
        if not _STEP_BEFORE.search(name[max(0, found.start() - 16) : found.start()]):
            name = name[: found.start()] + "\0" * len(found[0]) + name[found.end() :]
    return name


@dataclass
class _Seen:
    """A number, the word before it and that behind it; `place` counts the numbers of one word."""

    start: int
    text: str
    label: str
    place: int
    attached: bool
    unit: str = ""
    after: str = ""


@lru_cache(1 << 14)
def read_numbers(name: str) -> tuple[Number, ...]:
    """The whole numbers in a name (without the ending of a file), and what each counts; none of
    one that is too long for a name.
    """
    if len(name) > _LONGEST:
        return ()
    numbers = [
        Number(found.start(1), found.end(1), int(found[1]), Kind.SHARD)
        for found in _OF.finditer(name)
        if found[1] != "*"
    ]
    plain = _OF.sub(lambda found: "\0" * len(found[0]), _masked(name))
    kinds: dict[int, Kind] = {}
    bare = not any(letter.isalpha() for letter in plain)
    seen = list(_seen(plain))
    for number, one in enumerate(seen):
        kinds[number] = _kind(one, bare=bare)
    for number, (first, second) in enumerate(pairwise(seen)):
        if second.label == first.label and (first.place, second.place) == (0, 1):
            kinds[number], kinds[number + 1] = _kinds_of_two(
                (first, kinds[number]), (second, kinds[number + 1])
            )
    for number, one in enumerate(seen):
        counts = kinds[number] in (Kind.STEP, Kind.CHECKPOINT)
        multiple = _MULTIPLES.get(one.unit, 1) if counts else 1
        end = one.start + len(one.text)
        numbers.append(Number(one.start, end, int(one.text) * multiple, kinds[number]))
    return tuple(sorted(numbers, key=lambda one: one.start))


def _seen(plain: str) -> Iterator[_Seen]:
    """The whole numbers of a name with the words around them."""
    tokens = list(_TOKENS.finditer(plain))
    label, place, near = "", 0, False
    for at, token in enumerate(tokens):
        if token.lastgroup == "word":
            label, place = token[0].lower(), 0
        elif token.lastgroup == "bar":
            label, place = "\0", 0
        elif token.lastgroup == "number" and len(token[0]) <= 18:
            near = at > 0 and tokens[at - 1].lastgroup == "word"
            one = _Seen(token.start(), token[0], label, place, near)
            one.unit, one.after = _behind(tokens[at + 1 : at + 6])
            place += 1
            yield one


def _behind(tokens: list[re.Match[str]]) -> tuple[str, str]:
    """The unit that stands at a number, and the word that stands behind it: none that says what the
    next number is.
    """
    unit = after = ""
    if tokens and tokens[0].lastgroup == "word":
        unit = tokens[0][0].lower()
        if _is_number(tokens[1:2]) or (unit not in _UNITS and _is_number(tokens[2:3])):
            return "", ""
        tokens = tokens[1:]
    if len(tokens) > 1 and (tokens[0].lastgroup, tokens[1].lastgroup) == ("gap", "word"):
        labels = _is_number(tokens[2:3]) or (
            len(tokens) > 2 and tokens[2].lastgroup == "gap" and _is_number(tokens[3:4])
        )
        after = "" if labels else tokens[1][0].lower()
    return unit, after


def _is_number(tokens: list[re.Match[str]]) -> bool:
    return bool(tokens) and tokens[0].lastgroup in ("number", "decimal")


def _is_step(word: str) -> bool:
    return word in _STEP_WORDS or (word.endswith(_STEP_ENDS) and word not in _OTHER_WORDS)


def _is_epoch(word: str) -> bool:
    return word in _EPOCH_WORDS or word.endswith(("epoch", "epochs"))


def _kind(one: _Seen, *, bare: bool) -> Kind:
    """Return what a number counts: its unit says so, or else the word before it, or else that
    behind it.
    """
    known = _kind_by_unit(one) or _kind_by_label(one)
    if known is not None:
        return known
    if _is_step(one.after):
        return Kind.STEP
    if _is_epoch(one.after) or (not one.label and one.after == "net"):  # 100_net_G of pix2pix
        return Kind.EPOCH
    if one.label.endswith(_CHECKPOINT_ENDS):
        return Kind.ATTACHED if one.attached else Kind.CHECKPOINT
    if bare or one.label in _PLAIN_WORDS:
        return Kind.NUMBER
    return Kind.OTHER if one.attached else Kind.LOOSE


def _kind_by_unit(one: _Seen) -> Kind | None:
    unit, first = one.unit, one.place == 0
    is_step = first and _is_step(one.label)
    if unit in _MULTIPLES:
        if is_step or _is_step(one.after):
            return Kind.STEP
        if unit == "k" and first and one.label.endswith(_CHECKPOINT_ENDS):  # checkpoint-100k
            return Kind.CHECKPOINT
    elif _is_step(unit):
        return Kind.STEP
    elif _is_epoch(unit) and unit != "e":
        return Kind.EPOCH
    return Kind.OTHER if unit and (not is_step or unit in _SIZES) else None


def _kind_by_label(one: _Seen) -> Kind | None:
    first = one.place == 0
    if _is_step(one.label):
        return Kind.STEP if first else Kind.OTHER
    if one.label in _SHARD_WORDS:
        return Kind.SHARD
    if _is_epoch(one.label):
        return Kind.EPOCH if first else Kind.LOOSE
    return Kind.OTHER if one.label in _OTHER_WORDS else None


def _kinds_of_two(first: tuple[_Seen, Kind], second: tuple[_Seen, Kind]) -> tuple[Kind, Kind]:
    """What two numbers behind one word count: an epoch and a step (`checkpoint_6_182000`)."""
    (one, kind), (other, other_kind) = first, second
    if kind not in (Kind.CHECKPOINT, Kind.ATTACHED, Kind.NUMBER) or kind is not other_kind:
        return kind, other_kind
    rises = int(other.text) >= int(one.text)
    if rises and (kind is not Kind.NUMBER or len(other.text) > 2):
        return Kind.EPOCH, Kind.CHECKPOINT if kind is Kind.ATTACHED else kind
    return (Kind.OTHER if kind is Kind.NUMBER else kind), Kind.OTHER


def _is_plausible(number: Number, name: str) -> bool:
    """Whether a number behind any word may be a step: none of an architecture, size or year."""
    if number.kind is not Kind.LOOSE or number.digits < 3:
        return False
    words = re.findall(r"[a-z]+", name.lower())
    if not any(word.startswith(_ARCHITECTURES) for word in words):
        return True
    power = number.value & (number.value - 1) == 0
    return number.digits > 3 and not power and not 1990 <= number.value < 2040


# -- steps -----------------------------------------------------------------------------------------

_TEXT_STEP = re.compile(r"\b(?:global[ _-]?)?step[s]?[ =:_#-]*([0-9]{1,18})\b", re.IGNORECASE)


def named_step(name: str, said: int | None = None, epoch: int | None = None) -> int | None:
    """The step that the name of a file or directory calls so, as in `checkpoint_6_182000.pt`.

    `said` and `epoch` are what the checkpoint itself gives: `checkpoint-12` is none of step 12
    where that is its epoch.
    """
    numbers = read_numbers(stem(name))
    called = [one.value for one in numbers if one.kind is Kind.STEP]
    if called:
        return called[-1]
    for kinds in ((Kind.CHECKPOINT,), (Kind.NUMBER, Kind.ATTACHED)):
        found = [one.value for one in numbers if one.kind in kinds and one.is_sure]
        if found:
            return None if _is_epoch_of(found[-1], said, epoch) else found[-1]
    return None


def step_in_name(name: str, epoch: int | None = None) -> int | None:
    """The same, or else the number in `checkpoint500`."""
    step = named_step(name, epoch=epoch)
    attached = [one.value for one in read_numbers(stem(name)) if one.kind is Kind.ATTACHED]
    if step is not None or not attached or _is_epoch_of(attached[-1], None, epoch):
        return step
    return attached[-1]


def number_in_name(name: str, epoch: int | None = None) -> int | None:
    """The number of a name that can hardly be anything but a step, as in `model-500.pt`: what there
    is to go by where neither the name nor the checkpoint speaks of steps.
    """
    numbers = read_numbers(stem(name))
    plain = [one.value for one in numbers if one.kind in (Kind.NUMBER, Kind.ATTACHED)]
    loose = [one.value for one in numbers if _is_plausible(one, name)]
    found = plain or loose
    return found[-1] if found and not _is_epoch_of(found[-1], None, epoch) else None


def _is_epoch_of(number: int, said: int | None, epoch: int | None) -> bool:
    """Whether a number in a name is the epoch of the checkpoint: trainers count them from 0 or from
    1, and save before or after they count on.
    """
    return number != said and epoch is not None and abs(number - epoch) <= 1


def epochs_in_name(name: str) -> list[int]:
    """The numbers of a name that it calls epochs."""
    return [one.value for one in read_numbers(stem(name)) if one.kind is Kind.EPOCH]


def is_alias(name: str) -> bool:
    """Whether a name says `last` or `best` where those of other checkpoints have a step."""
    counts = [one for one in read_numbers(stem(name)) if one.kind not in (Kind.SHARD, Kind.OTHER)]
    return ALIAS.search(name) is not None and not counts


def step_in_text(text: str) -> int | None:
    """The step that a message speaks of, as in `after step 2000`."""
    found = _TEXT_STEP.search(text)
    return int(found[1]) if found else None
