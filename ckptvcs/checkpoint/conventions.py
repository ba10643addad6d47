"""Interpret the names that trainers give to files, directories and keys.

The word beside a number says what it counts (`ep0-ba200-rank0`: an epoch, a step, a rank).  A
number without such a word is a step only if other meanings are unlikely.  `grouping.py` and
`matching.py` use these rules.  This module reads no files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from itertools import pairwise
from typing import Any


def words(*lines: str) -> frozenset[str]:
    """Return the set of words in these lines of text."""
    return frozenset(word for line in lines for word in line.split())


# -- names of files --------------------------------------------------------------------------------

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SAFETENSORS_SUFFIX = ".safetensors"
SHARD_SUFFIX = ".distcp"
"""The suffix of torch.distributed.checkpoint."""

SUFFIXES = (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX)
"""The usual suffixes of checkpoint files."""

TENSOR_SUFFIXES = (*SUFFIXES, SHARD_SUFFIX)
"""The suffixes of files that hold tensors."""

TAKEN_SUFFIXES = (*SUFFIXES, ".tar", ".th", ".pyth", ".torch")
"""Suffixes of the files that an import opens; `.tar` is for `model.pth.tar`."""

TEMPORARY = re.compile(r"\..*|tmp[-_].*|.*\.(tmp|temp|part|partial)|.*~", re.IGNORECASE)
"""Names of hidden or unfinished entries of a folder."""

PIECE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)"
    r"|.*-[0-9]+-of-[0-9]+\.[a-z]+|.*\.distcp"
)
"""Names of files that are only a part of a checkpoint."""

PIECE_OF_ONE = re.compile(
    r"optimizer\.(bin|pt|pth)|\.metadata|.*\.distcp|(.*_)?mp_rank_[0-9_]+_(model|optim)_states\.pt"
    r"|model_optim_rng\.pt|(model|optim)_world_size_[0-9]+_rank_[0-9]+\.pt"
)
"""Names of files that are only in folders that are one checkpoint."""

FOLDER_OF_ONE = re.compile(r"(mp|tp)_rank_[0-9]+(_.*)?")
"""Names of folders that are only in such folders: Megatron writes one for each process."""

INCOMPLETE = "checkpoint-is-incomplete.txt"
"""Lightning's marker file in a directory that is not finished."""

HF_FIRST, HF_LAST = "training_args.bin", "trainer_state.json"
"""The first and the last file that the Hugging Face Trainer writes into a checkpoint."""

LIGHTNING_LAST = re.compile(r"last(-v[0-9]+)?\.ckpt")
"""Lightning's extra copy of the newest checkpoint."""


def stem(name: str) -> str:
    """Return a name without checkpoint suffixes: `model` for `model.pth.tar`."""
    while name.lower().endswith(TAKEN_SUFFIXES) and name.rindex("."):
        name = name[: name.rindex(".")]
    return name


# -- keys of a checkpoint --------------------------------------------------------------------------

PART_KEYS = words(
    "model state_dict model_state_dict module net network optimizer optimizer_state_dict optim"
)
"""Keys at the top of a checkpoint whose value is the whole model or optimizer."""

_STEP_KEYS = (
    "step global_step iteration iter steps current_step"
    " global_steps"  # DeepSpeed
    " iter_num"  # nanoGPT
    " num_updates optimizer_history.-1.num_updates"  # fairseq
    " meta.iter"  # mmengine
    " state.timestamp.batch state.timestamp.Timestamp.batch"  # composer
    " train_state.step trainer_state.global_step"
)
_EPOCH_KEYS = (
    "epoch current_epoch meta.epoch extra_state.train_iterator.epoch"
    " state.timestamp.epoch state.timestamp.Timestamp.epoch"
)
_STATE_FILES = {HF_LAST: "global_step", "metadata.json": "step", "meta.json": "step"}
_STEP_FILES = frozenset({"latest", "latest_checkpointed_iteration.txt"})  # DeepSpeed, Megatron
_OTHER_STEPS = "random_states"  # files of accelerate: their step counts accumulated gradients


def may_hold_step(path: str) -> bool:
    """Return whether a key at the top of a file may be the step of its checkpoint."""
    return not path.rpartition("/")[2].startswith(_OTHER_STEPS)


def step_key_of(path: str) -> str | None:
    """Return the key of the step in a JSON file beside the tensors; None for other files."""
    return _STATE_FILES.get(path.rpartition("/")[2])


def is_step_file(path: str) -> bool:
    """Return whether a file at the top of a checkpoint contains only a step's name or number."""
    return path in _STEP_FILES


def step_in_keys(tree: object) -> int | None:
    """Return the step under one of the usual keys, or None."""
    return _first_count(tree, _STEP_KEYS)


def epoch_in_keys(tree: object) -> int | None:
    """Return the epoch under one of the usual keys, or None."""
    return _first_count(tree, _EPOCH_KEYS)


def is_count(value: object) -> bool:
    """Return whether a value may be a step."""
    return type(value) is int and 0 <= value < 1 << 62


def _first_count(tree: object, paths: str) -> int | None:
    return next(filter(is_count, (_at(tree, path) for path in paths.split())), None)


def _at(tree: object, path: str) -> Any:
    """Return the value at a dotted path, where `-1` is the last item of a list."""
    node: Any = tree
    for key in path.split("."):
        if isinstance(node, dict):
            node = node.get(key)
        else:
            node = node[-1] if isinstance(node, list) and node and key == "-1" else None
    return node


# -- files beside each other -----------------------------------------------------------------------

ALIAS = re.compile(r"(?<![A-Za-z])(best|last|latest|final|newest)(?![A-Za-z])", re.IGNORECASE)
"""A word in place of a step; the trainer overwrites such a file again and again."""


# -- numbers in names ------------------------------------------------------------------------------


class Kind(Enum):
    """The meaning of a number in a name."""

    STEP = auto()  # step-1000, iter_20000, ep0-ba200, 10000_steps
    CHECKPOINT = auto()  # checkpoint-500, ckpt_356, and 182000 in checkpoint_6_182000
    ATTACHED = auto()  # checkpoint500: some trainers count epochs like this
    NUMBER = auto()  # model-500, opt010000, 1000
    LOOSE = auto()  # myrun_1000
    EPOCH = auto()
    SHARD = auto()  # a rank, a part, a shard
    OTHER = auto()  # a seed, a size, a version, a date


@dataclass(frozen=True)
class Number:
    """A number in a name: its position, value and meaning."""

    start: int
    end: int
    value: int
    kind: Kind

    @property
    def digits(self) -> int:
        """Return the number of digits, with leading zeros."""
        return self.end - self.start

    @property
    def is_sure(self) -> bool:
        """Return whether it is a step regardless of other names."""
        padded = self.kind in (Kind.NUMBER, Kind.ATTACHED) and self.digits >= _PADDED
        return self.kind in (Kind.STEP, Kind.CHECKPOINT) or padded


_LONGEST = 4096  # characters; file systems do not allow longer names
_PADDED = 6  # digits: model_0004999.pth of detectron2, model010000.pt of guided diffusion

_STEP_ENDS = tuple(words("step steps iter iters iteration iterations update updates"))
_STEP_WORDS = frozenset({"it", "itr", "ba"})
_EPOCH_WORDS = frozenset({"ep", "e", "phase", "round", "rounds"})
_CHECKPOINT_ENDS = ("checkpoint", "checkpoints", "ckpt", "chkpt")
_SHARD_WORDS = words(
    "rank ranks shard shards part parts partition worker process proc node gpu device split",
    "chunk piece slice tp pp dp mp cp fsdp zero consolidated expert experts layer",
)
_PLAIN_WORDS = words(
    "model models net network weight weights param params state states opt optim optimizer ema",
    "unet module snapshot save saved backup training train trainer scheduler g d gen disc",
    "generator discriminator netg netd actor critic policy value agent",
)
_OTHER_WORDS = words(
    "epochstep epochsteps seed fold run trial exp experiment job id task version v lr bs b k x",
    "batch size dim hidden layers heads width depth res resolution patch window px len length",
    "ctx context seq tokens token samples sample vocab top loss acc accuracy score reward",
    "return bleu wer cer map miou psnr fid stage ingredient level fp bf int float uint bit bits",
    "q alpha beta temp time copy group config cfg h r",
)
_SIZES = words("b m mb gb bt mt t tb tokens px bit bits")
_MULTIPLES = {"k": 1_000, "m": 1_000_000}
_UNITS = _SIZES | {*_MULTIPLES, "step", "steps", "iter", "iters", "epoch", "epochs", "x"}
_ARCHITECTURES = tuple(
    words(
        "resnet resnext densenet vgg vit swin deit beit convnext efficientnet mobilenet inception",
        "regnet unet clip dino imagenet llama gpt bert qwen mistral stylegan diffusion",
    )
)

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
    """Return a name with NUL in place of hashes, versions, dates and numbers of copies."""
    for pattern in _MASKED:
        name = pattern.sub(_blank, name)
    for match in _DATE.finditer(name):
        if not _STEP_BEFORE.search(name[max(0, match.start() - 16) : match.start()]):
            name = name[: match.start()] + _blank(match) + name[match.end() :]
    return name


def _blank(match: re.Match[str]) -> str:
    return "\0" * len(match[0])


@dataclass
class _NumberToken:
    """A number with the words around it; `place` counts the numbers after one word, from 0."""

    start: int
    text: str
    label: str
    place: int
    attached: bool
    unit: str
    after: str


@lru_cache(1 << 14)
def read_numbers(name: str) -> tuple[Number, ...]:
    """Return the whole numbers in a name without suffix, each with its meaning.

    Return an empty tuple for a name of more than 4096 characters.
    """
    if len(name) > _LONGEST:
        return ()
    numbers = [
        Number(match.start(1), match.end(1), int(match[1]), Kind.SHARD)
        for match in _OF.finditer(name)
        if match[1] != "*"
    ]
    plain = _OF.sub(_blank, _masked(name))
    bare = not any(letter.isalpha() for letter in plain)
    tokens = list(_number_tokens(plain))
    kinds = [_kind(token, bare=bare) for token in tokens]
    for at, (first, second) in enumerate(pairwise(tokens)):
        if second.label == first.label and (first.place, second.place) == (0, 1):
            kinds[at : at + 2] = _kinds_of_two((first, kinds[at]), (second, kinds[at + 1]))
    for token, kind in zip(tokens, kinds, strict=True):
        counts = kind in (Kind.STEP, Kind.CHECKPOINT)
        multiple = _MULTIPLES.get(token.unit, 1) if counts else 1
        end = token.start + len(token.text)
        numbers.append(Number(token.start, end, int(token.text) * multiple, kind))
    return tuple(sorted(numbers, key=lambda number: number.start))


def _number_tokens(plain: str) -> Iterator[_NumberToken]:
    """Yield the whole numbers of a name with the words around them."""
    tokens = list(_TOKENS.finditer(plain))
    label, place = "", 0
    for at, token in enumerate(tokens):
        if token.lastgroup == "word":
            label, place = token[0].lower(), 0
        elif token.lastgroup == "bar":
            label, place = "\0", 0
        elif token.lastgroup == "number" and len(token[0]) <= 18:
            attached = at > 0 and tokens[at - 1].lastgroup == "word"
            unit, after = _words_after(tokens[at + 1 : at + 6])
            yield _NumberToken(token.start(), token[0], label, place, attached, unit, after)
            place += 1


def _words_after(tokens: list[re.Match[str]]) -> tuple[str, str]:
    """Return the unit attached to a number, and the next word.

    Both exclude a word that belongs to the next number.
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


def _kind(token: _NumberToken, *, bare: bool) -> Kind:
    """Return the meaning of a number, from its unit, the word before it, or the word after it."""
    kind = _kind_by_unit(token) or _kind_by_label(token)
    if kind is not None:
        return kind
    if _is_step(token.after):
        return Kind.STEP
    if _is_epoch(token.after) or (not token.label and token.after == "net"):  # 100_net_G of pix2pix
        return Kind.EPOCH
    if token.label.endswith(_CHECKPOINT_ENDS):
        return Kind.ATTACHED if token.attached else Kind.CHECKPOINT
    if bare or token.label in _PLAIN_WORDS:
        return Kind.NUMBER
    return Kind.OTHER if token.attached else Kind.LOOSE


def _kind_by_unit(token: _NumberToken) -> Kind | None:
    unit, first = token.unit, token.place == 0
    is_step = first and _is_step(token.label)
    if unit in _MULTIPLES:
        if is_step or _is_step(token.after):
            return Kind.STEP
        if unit == "k" and first and token.label.endswith(_CHECKPOINT_ENDS):  # checkpoint-100k
            return Kind.CHECKPOINT
    elif _is_step(unit):
        return Kind.STEP
    elif _is_epoch(unit) and unit != "e":
        return Kind.EPOCH
    return Kind.OTHER if unit and (not is_step or unit in _SIZES) else None


def _kind_by_label(token: _NumberToken) -> Kind | None:
    first = token.place == 0
    if _is_step(token.label):
        return Kind.STEP if first else Kind.OTHER
    if token.label in _SHARD_WORDS:
        return Kind.SHARD
    if _is_epoch(token.label):
        return Kind.EPOCH if first else Kind.LOOSE
    return Kind.OTHER if token.label in _OTHER_WORDS else None


def _kinds_of_two(
    first: tuple[_NumberToken, Kind], second: tuple[_NumberToken, Kind]
) -> tuple[Kind, Kind]:
    """Return the meanings of two numbers after one word.

    They may be an epoch and a step (`checkpoint_6_182000`).
    """
    (token, kind), (next_token, next_kind) = first, second
    if kind not in (Kind.CHECKPOINT, Kind.ATTACHED, Kind.NUMBER) or kind is not next_kind:
        return kind, next_kind
    rises = int(next_token.text) >= int(token.text)
    if rises and (kind is not Kind.NUMBER or len(next_token.text) > 2):
        return Kind.EPOCH, Kind.CHECKPOINT if kind is Kind.ATTACHED else kind
    return (Kind.OTHER if kind is Kind.NUMBER else kind), Kind.OTHER


def _is_plausible(number: Number, name: str) -> bool:
    """Return whether a number after an unknown word may be a step.

    A number of an architecture, a power of two beside one, or a year is not plausible.
    """
    if number.digits < 3:
        return False
    words = re.findall(r"[a-z]+", name.lower())
    if not any(word.startswith(_ARCHITECTURES) for word in words):
        return True
    power = number.value & (number.value - 1) == 0
    return number.digits > 3 and not power and not 1990 <= number.value < 2040


# -- steps -----------------------------------------------------------------------------------------

_TEXT_STEP = re.compile(r"\b(?:global[ _-]?)?step[s]?[ =:_#-]*([0-9]{1,18})\b", re.IGNORECASE)


def _of_kind(name: str, *kinds: Kind) -> list[Number]:
    return [number for number in read_numbers(stem(name)) if number.kind in kinds]


def named_step(name: str, said: int | None = None, epoch: int | None = None) -> int | None:
    """Return the step in the name of a file or directory, as in `checkpoint_6_182000.pt`.

    `said` and `epoch` are the numbers that the checkpoint itself holds.  If its epoch is 12,
    `checkpoint-12` does not name a step.
    """
    if steps := _of_kind(name, Kind.STEP):
        return steps[-1].value
    for kinds in ((Kind.CHECKPOINT,), (Kind.NUMBER, Kind.ATTACHED)):
        if steps := [number for number in _of_kind(name, *kinds) if number.is_sure]:
            return None if _is_epoch_of(steps[-1], said, epoch) else steps[-1].value
    return None


def step_in_name(name: str, epoch: int | None = None) -> int | None:
    """Return the step in a name as `named_step` does, or the number in `checkpoint500`."""
    step = named_step(name, epoch=epoch)
    attached = _of_kind(name, Kind.ATTACHED)
    if step is not None or not attached or _is_epoch_of(attached[-1], None, epoch):
        return step
    return attached[-1].value


def number_in_name(name: str, epoch: int | None = None) -> int | None:
    """Return the number in a name that is probably a step, as in `model-500.pt`.

    It is a fallback if neither the name nor the checkpoint says the step.
    """
    loose = [number for number in _of_kind(name, Kind.LOOSE) if _is_plausible(number, name)]
    steps = _of_kind(name, Kind.NUMBER, Kind.ATTACHED) or loose
    return steps[-1].value if steps and not _is_epoch_of(steps[-1], None, epoch) else None


def _is_epoch_of(number: Number, said: int | None, epoch: int | None) -> bool:
    """Return whether a number in a name is the epoch of the checkpoint.

    They may differ by 1: trainers count from 0 or 1, and save before or after they increment.
    """
    return number.value != said and epoch is not None and abs(number.value - epoch) <= 1


def epochs_in_name(name: str) -> list[int]:
    """Return the epochs in a name."""
    return [number.value for number in _of_kind(name, Kind.EPOCH)]


def counts_in_name(name: str) -> list[Number]:
    """Return the numbers in a name that may count steps or epochs."""
    return _of_kind(name, *(kind for kind in Kind if kind not in (Kind.SHARD, Kind.OTHER)))


def is_alias(name: str) -> bool:
    """Return whether a name has `last` or `best` in place of a step."""
    return ALIAS.search(name) is not None and not counts_in_name(name)


def step_in_text(text: str) -> int | None:
    """Return the step in a message, as in `after step 2000`, or None."""
    match = _TEXT_STEP.search(text)
    return int(match[1]) if match else None
