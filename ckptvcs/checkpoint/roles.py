"""Assign roles: the part and role of each tensor, the weight of each moment, and the evidence.

Lossy compression needs evidence.  A tensor without evidence is exact.  A tensor is a

    weight  if it is a parameter of a given module, if it is paired with moments, or if it is in
            the state dict of a model (recognized by its form and its place)
    moment  if it is in the state of an optimizer (`optimizer_state.py`)

If all parameters with optimizer state are paired, an unpaired tensor in the same state dict is not
a weight.  It is a buffer or frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from ckptvcs.checkpoint.conventions import words
from ckptvcs.checkpoint.layout import Layout, StoredTensor
from ckptvcs.checkpoint.optimizer_state import (
    DIVIDING,
    FACTORS,
    FIRST,
    ITERATES,
    MASTERS,
    MOMENTS,
    Names,
    Optimizer,
    Rule,
    Slot,
    find_flat,
    find_optimizers,
    has_moment_name,
)
from ckptvcs.checkpoint.pickle_reader import walk
from ckptvcs.checkpoint.state_dicts import (
    is_parameter,
    is_place,
    leaves_of,
    may_be_buffers,
    may_be_weight,
)
from ckptvcs.codec.dtypes import can_be_lossy

WEIGHT, OTHER = "weight", "other"

LOSSY = MOMENTS | {WEIGHT}
"""Roles of tensors that are compressed with loss, if their dtype allows it."""

MODULE, PAIRED, STATE_DICT = "module", "moments", "state dict"
"""Evidence of a weight: a parameter of a module; paired with moments; in a model's state dict."""
OPTIMIZER, BESIDE = "optimizer", "beside its moments"
"""Evidence of a moment: in an optimizer's state; beside its weight, with possible values."""

_REST_FILES = tuple(
    words(
        "rng_state random_states scheduler scaler training_args trainer_state sampler",
        "dl_state_dict custom_checkpoint",
    )
)
_REST_KEYS = words(
    "rng rng_state rng_states cuda_rng_state torch_rng_state numpy_rng_state scheduler",
    "lr_scheduler lr_schedulers scaler grad_scaler args config hyper_parameters callbacks loops",
    "random random_state random_states sampler",
)
_MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module", "net", "network", "")


@dataclass
class Role:
    """The part and role of a tensor, with the evidence.

    For a moment, `pair` is its weight and `rule` its optimizer's rule.  All states of one
    parameter share the number `parameter`.
    """

    part: str
    role: str
    pair: StoredTensor | None = None
    rule: Rule | None = None
    parameter: int = 0
    evidence: str = ""

    def prove_weight(self, evidence: str) -> None:
        """Make the tensor a weight."""
        self.role, self.evidence = WEIGHT, evidence

    @property
    def is_open(self) -> bool:
        """Return whether the tensor is part of a model and has no role yet."""
        return self.part == "model" and self.role == OTHER


@dataclass
class _Container:
    """The floating tensors of a state dict that may be weights, in its order.

    `names` are their names in the state dict, `module` has the parameter names of the given
    module.  `doubtful` says that all tensors may be buffers.
    """

    place: str
    file: int
    names: dict[StoredTensor, str]
    module: frozenset[str] = field(default_factory=frozenset)
    doubtful: bool = False


def assign_roles(files: list[tuple[str, Layout]], names: Names) -> list[list[Role]]:
    """Return the roles of all tensors of each file (path, layout), in order.

    `names` override the parameter names in the files.
    """
    assignment = _Assignment(files, names)
    assignment.assign()
    return [[assignment.roles[tensor] for tensor in layout.tensors] for _, layout in files]


class _Assignment:
    """The roles of all tensors, and the weights that are `paired` with moments.

    `is_whole` says that all parameters with a state are paired.  Otherwise `shapes` are the
    parameter shapes of the optimizers with unpaired parameters.
    """

    def __init__(self, files: list[tuple[str, Layout]], names: Names) -> None:
        self._files, self._names = files, names
        self.roles = {
            tensor: _default_role(path, tensor)
            for path, layout in files
            for tensor in layout.tensors
        }
        self._containers: list[_Container] = []
        self._paired: set[StoredTensor] = set()
        self._is_whole, self._shapes = True, set[tuple[int, ...]]()

    def assign(self) -> None:
        """Assign all roles."""
        optimizers = list(self._optimizers())
        for optimizer in optimizers:
            for tensor in optimizer.tensors:
                self.roles[tensor].part = "optimizer"
            for slot in optimizer.slots:
                self._take_slot(slot, OPTIMIZER)
        taken = {tensor for optimizer in optimizers for tensor in optimizer.tensors}
        for number, (path, layout) in enumerate(self._files):
            self._containers += self._state_dicts(path, layout, number, taken)
        for optimizer in optimizers:
            self._pair_optimizer(optimizer)
        self._take_flat(taken)
        for container in self._containers:
            self._take_container(container)
        self._refuse_shared()

    def _optimizers(self) -> Iterator[Optimizer]:
        """Yield the plain optimizer states of all files."""
        for number, (path, layout) in enumerate(self._files):
            given = {place: row for (file, place), row in self._names.items() if file == path}
            yield from find_optimizers(layout, number, given)

    def _take_slot(self, slot: Slot, evidence: str) -> None:
        """Set the roles of a parameter's states: moments, or float32 weights (part `model`)."""
        for key, tensor in slot.state.items():
            role = self.roles[tensor]
            weight = key in MASTERS and tensor.dtype == "F32"
            weight |= key in ITERATES and "n" not in slot.state  # z of FTRL is a sum of gradients
            role.part = "model" if weight else "optimizer"
            role.role = WEIGHT if weight else OTHER if slot.closed else key
            role.rule, role.parameter, role.evidence = slot.rule, id(slot), evidence
        if slot.weight is not None:
            self.roles[slot.weight].part = "model"
            self.roles[slot.weight].prove_weight(PAIRED)

    def _state_dicts(
        self, path: str, layout: Layout, file: int, taken: set[StoredTensor]
    ) -> Iterator[_Container]:
        """Yield the state dicts of models in a file, the outermost first."""
        used = set(taken)
        for steps, node in walk(layout.tree, (dict,)):
            if not isinstance(node, dict) or not is_place(path, layout.format, steps, node):
                continue
            names = {
                tensor: name
                for tensor, name in _candidates(leaves_of(node) or [], layout.by_key)
                if tensor not in used and self.roles[tensor].is_open
            }
            used |= names.keys()
            if names:
                place = ".".join(steps)
                is_named = layout.format != "safetensors"
                given = self._names.get((path, place), []) if is_named else []
                module = frozenset(name for row in given for name in row if name)
                yield _Container(place, file, names, module, may_be_buffers(node))

    def _pair_optimizer(self, optimizer: Optimizer) -> None:
        """Pair the weights of an optimizer with their moments, and note unpaired parameters."""
        pairs = _pair(optimizer, self._containers)
        for slot, weight in pairs:
            self._join(slot, weight)
        paired = {id(slot) for slot, _ in pairs}
        stateful = [
            slot
            for slot in optimizer.slots
            if not all(state.inline for state in slot.state.values())
        ]
        if any(id(slot) not in paired for slot in stateful):
            self._is_whole = False
            self._shapes |= {shape for slot in stateful if (shape := _shape(slot))}

    def _join(self, slot: Slot, weight: StoredTensor) -> None:
        self._paired.add(weight)
        self.roles[weight].prove_weight(PAIRED)
        for tensor in slot.state.values():
            if tensor.shape == weight.shape:
                self.roles[tensor].pair = weight

    def _take_flat(self, taken: set[StoredTensor]) -> None:
        """Give roles to moments that have their keys in their names, and to their weights."""
        named = {tensor for container in self._containers for tensor in container.names}
        flat = list(find_flat(self._files, taken, named))
        ends = _ends(self._containers) if flat else {}
        for slot in flat:
            if slot.state.keys() <= DIVIDING:
                continue  # without the average that it divides, the step error is unknown
            owner = self._owner(slot, ends)
            if owner is not None or (slot.is_optimizers and _is_complete(slot)):
                self._take_slot(slot, BESIDE)
            if owner is not None:
                self._join(slot, owner)

    def _owner(self, slot: Slot, ends: _Ends) -> StoredTensor | None:
        """Return the weight of a flat slot: the tensor beside it, or one with its name."""
        if slot.weight is not None:
            return slot.weight
        owner = _named(slot, ends)
        # Statistics can have such names too.  A weight with other moments is not their weight.
        return owner if slot.is_optimizers or owner not in self._paired else None

    def _take_container(self, container: _Container) -> None:
        """Set the roles of the weights in a state dict.

        With a module, its parameters are the weights.  Otherwise the paired tensors are; if none is
        paired, all tensors are.  Tensors that fit unpaired parameters of an optimizer are weights
        too.
        """
        if container.module:
            for tensor, name in container.names.items():
                if _is_in(container.module, name):
                    self.roles[tensor].prove_weight(MODULE)
            return
        is_paired = not self._paired.isdisjoint(container.names)
        if container.doubtful or (self._is_whole and is_paired):
            return
        for tensor in _fitting(container, self._shapes):
            if self.roles[tensor].role != WEIGHT:
                self.roles[tensor].prove_weight(STATE_DICT)

    def _refuse_shared(self) -> None:
        """Make storages exact that a weight or a moment shares with another tensor."""
        for number, (_, layout) in enumerate(self._files):
            beside = [container for container in self._containers if container.file == number]
            for tensor in layout.tensors:
                role = self.roles[tensor]
                if role.role != OTHER and tensor.views and not _is_sound(role, tensor, beside):
                    role.role, role.evidence, role.pair = OTHER, "", None
        for role in self.roles.values():
            if role.pair is not None and self.roles[role.pair].role != WEIGHT:
                role.pair = None


def _default_role(path: str, tensor: StoredTensor) -> Role:
    stem = PurePosixPath(path).name
    top = tensor.name.split(".")[0].lower()
    unnamed = not tensor.key or tensor.name.startswith("storage.")
    if unnamed or stem.startswith(_REST_FILES) or top in _REST_KEYS or "rng" in top.split("_"):
        return Role("rest", OTHER)
    return Role("optimizer" if stem.startswith("optimizer") else "model", OTHER)


def _is_complete(slot: Slot) -> bool:
    """Return whether a slot that is not doubtful has an average and the moment that divides it."""
    return not slot.doubtful and any(
        not slot.state.keys().isdisjoint(FIRST.get(key, ())) for key in slot.state
    )


def _is_sound(role: Role, tensor: StoredTensor, containers: list[_Container]) -> bool:
    """Return whether all views of a storage have its role.

    The views of a weight must be in state dicts of the file; views of moments must share a key.
    """
    names = [view.name for view in tensor.views]
    if role.role != WEIGHT or role.evidence == OPTIMIZER:
        return len({name.rpartition(".")[2] for name in names}) == 1
    inner = tuple(f"{c.place}." if c.place else "" for c in containers)
    inside = all(name.startswith(inner) for name in names)
    modules = [c.module for c in containers if c.module]
    return (inside or (role.evidence == PAIRED and not containers)) and all(
        _is_in(module, name) for module in modules for name in names
    )


def _is_end(name: str, of: str) -> bool:
    """Return whether `of` is this name or ends with it (module wrappers add a prefix)."""
    return name == of or of.endswith(f".{name}")


def _is_in(module: frozenset[str], name: str) -> bool:
    """Return whether a parameter of the module has this name, apart from prefixes."""
    return any(_is_end(of, name) or _is_end(name, of) for of in module)


def _fitting(container: _Container, shapes: set[tuple[int, ...]]) -> list[StoredTensor]:
    """Return the tensors of a state dict that may be unpaired parameters with these shapes.

    Of several tensors of a shape, those named like parameters count.  If no tensor has such a
    shape (parameters may be stored flat), all tensors count.
    """
    same = [tensor for tensor in container.names if tensor.shape in shapes]
    named = [tensor for tensor in same if is_parameter(container.names[tensor])]
    named_shapes = {tensor.shape for tensor in named}
    others = [tensor for tensor in same if tensor.shape not in named_shapes]
    return named + others or list(container.names)


def _candidates(
    leaves: list[tuple[str, str]], by_key: Mapping[str, StoredTensor]
) -> Iterator[tuple[StoredTensor, str]]:
    """Yield the tensors of a state dict that may be weights, each with its first name there."""
    names = {name for name, _ in leaves}
    first: dict[str, str] = {}
    for name, key in leaves:
        first.setdefault(key, name)
    for key, name in first.items():
        tensor = by_key.get(key)
        if tensor is None or not may_be_weight(name, names):
            continue
        if can_be_lossy(tensor.dtype) and not has_moment_name(tensor):
            yield tensor, name


# -- pairs -----------------------------------------------------------------------------------------


def _pair(optimizer: Optimizer, containers: list[_Container]) -> list[tuple[Slot, StoredTensor]]:
    slots = optimizer.slots
    beside = [(slot, slot.weight) for slot in slots if slot.weight is not None]
    if beside:
        return beside
    nearest = [container for container in containers if container.file == optimizer.file]
    if any(slot.names for slot in slots):
        # Shards of a weight share a name: prefer the file of the optimizer.
        return _pair_by_name(slots, nearest) or _pair_by_name(slots, containers)
    fitting = {
        container.place: pairs
        for container in nearest
        if (pairs := _pair_by_order(optimizer.groups, list(container.names)))
    }
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    # A copy of the model (such as an average) fits as well: prefer a key that names the model.
    return next((fitting[name] for name in _MODEL_KEYS if name in fitting), [])


def _pair_by_name(
    slots: list[Slot], containers: list[_Container]
) -> list[tuple[Slot, StoredTensor]]:
    ends = _ends(containers)
    pairs = [(slot, _named(slot, ends)) for slot in slots]
    return [(slot, weight) for slot, weight in pairs if weight is not None]


_Ends = dict[str, list[tuple[StoredTensor, str]]]
"""Tensors with the places of their containers, by each end of their names."""


def _ends(containers: Iterable[_Container]) -> _Ends:
    ends: _Ends = {}
    for container in containers:
        for tensor, inner_name in container.names.items():
            names = {inner_name, tensor.name, *(view.name for view in tensor.views)}
            for end in {
                ".".join(steps[start:])
                for steps in (name.split(".") for name in names)
                for start in range(len(steps))
            }:
                ends.setdefault(end, []).append((tensor, container.place))
    return ends


def _named(slot: Slot, ends: _Ends) -> StoredTensor | None:
    """Return the weight of a slot, or None.

    It has one of the slot's names, or is the only tensor whose name ends with one.  If the moments
    have a shape, it has the same shape.
    """
    shape = _shape(slot)
    for name in slot.names:
        options = ends.get(name, [])
        whole = [tensor for tensor, _ in options if tensor.name == name]
        models = [tensor for tensor, place in options if place.split(".")[0] in _MODEL_KEYS]
        for row in (whole, models, [tensor for tensor, _ in options]):
            if len(row) == 1:
                return row[0] if shape in (None, row[0].shape) or len(slot.names) == 1 else None
    return None


def _shape(slot: Slot) -> tuple[int, ...] | None:
    """Return the shape of a parameter, derived from its moments; None if that is impossible."""
    factors = next((pair for pair in FACTORS if {*pair} <= slot.state.keys()), ())
    shapes = {tensor.shape for key, tensor in slot.state.items() if key not in ("step", *factors)}
    if len(shapes) == 1:
        return shapes.pop()
    if shapes or not factors:
        return None
    row, column = (slot.state[key].shape for key in factors)
    if row[-1:] == (1,) and len(row) == len(column) > 1:  # torch keeps dimensions of size 1
        return (*row[:-1], column[-1])
    return (*row, *column[-1:])


def _pair_by_order(
    groups: list[list[Slot]], weights: list[StoredTensor]
) -> list[tuple[Slot, StoredTensor]]:
    """Return the pairs if each group is a subsequence of the weights in one way only.

    Return an empty list if a group fits in no way or in several, or if two groups overlap.
    """
    pairs: list[tuple[Slot, StoredTensor]] = []
    taken: set[int] = set()
    shapes = [tensor.shape for tensor in weights]
    for group in groups:
        shaped = [(slot, shape) for slot in group if (shape := _shape(slot)) is not None]
        wanted = [shape for _, shape in shaped]
        first = _embed(wanted, shapes)
        last = _embed(wanted[::-1], shapes[::-1])
        if first is None or last is None:
            return []
        if first != [len(shapes) - 1 - position for position in reversed(last)]:
            return []
        if taken.intersection(first):
            return []
        taken.update(first)
        pairs += [
            (slot, weights[position]) for (slot, _), position in zip(shaped, first, strict=True)
        ]
    return pairs


def _embed(wanted: list[tuple[int, ...]], shapes: list[tuple[int, ...]]) -> list[int] | None:
    """Return the leftmost positions of `wanted` as a subsequence of `shapes`, or None."""
    positions, at = [], 0
    for shape in wanted:
        while at < len(shapes) and shapes[at] != shape:
            at += 1
        if at == len(shapes):
            return None
        positions.append(at)
        at += 1
    return positions
