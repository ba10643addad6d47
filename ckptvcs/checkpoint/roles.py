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
    "random_state sampler",
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

    @property
    def is_open(self) -> bool:
        """Return whether the tensor is part of a model and has no role yet."""
        return self.part == "model" and self.role == OTHER


@dataclass
class _Container:
    """The floating tensors of a state dict that may be weights, in its order.

    `names` maps the id() of a tensor to its name in the state dict, `module` has the parameter
    names of the given module.  `doubtful` says that all tensors may be buffers.
    """

    place: str
    file: int
    tensors: list[StoredTensor]
    names: dict[int, str]
    module: frozenset[str] = field(default_factory=frozenset)
    doubtful: bool = False


@dataclass
class _Pairs:
    """The weights that are `paired` with moments, by id().

    `is_whole` says that all parameters with a state are paired.  Otherwise `shapes` are the
    parameter shapes of the optimizers with unpaired parameters.
    """

    paired: set[int] = field(default_factory=set)
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    is_whole: bool = True


def assign_roles(files: list[tuple[str, Layout]], names: Names) -> list[list[Role]]:
    """Return the roles of all tensors of each file (path, layout), in order.

    `names` override the parameter names in the files.
    """
    rows = [[_default_role(path, tensor) for tensor in layout.tensors] for path, layout in files]
    roles: dict[int, Role] = {}
    for (_, layout), row in zip(files, rows, strict=True):
        roles |= zip(map(id, layout.tensors), row, strict=True)
    optimizers = list(_optimizers(files, names))
    for optimizer in optimizers:
        _take_optimizer(optimizer, roles)
    taken = {id(tensor) for optimizer in optimizers for tensor in optimizer.tensors}
    containers = [
        container
        for number, (path, layout) in enumerate(files)
        for container in _containers(path, layout, number, roles, taken, names)
    ]
    pairs = _Pairs()
    for optimizer in optimizers:
        _pair_optimizer(optimizer, containers, roles, pairs)
    _take_flat(files, taken, containers, roles, pairs)
    for container in containers:
        _take_container(container, roles, pairs)
    _refuse_shared(roles, files, containers)
    return rows


def _optimizers(files: list[tuple[str, Layout]], names: Names) -> Iterator[Optimizer]:
    """Yield the plain optimizer states of all files."""
    for number, (path, layout) in enumerate(files):
        given = {place: row for (file, place), row in names.items() if file == path}
        yield from find_optimizers(layout, number, given)


def _pair_optimizer(
    optimizer: Optimizer, containers: list[_Container], roles: dict[int, Role], pairs: _Pairs
) -> None:
    """Pair the weights of an optimizer with their moments, and note the unpaired parameters."""
    matches = _pair(optimizer, containers)
    for slot, weight in matches:
        _join(slot, weight, roles, pairs.paired)
    paired = {id(slot) for slot, _ in matches}
    stateful = [
        slot for slot in optimizer.slots if not all(state.inline for state in slot.state.values())
    ]
    if any(id(slot) not in paired for slot in stateful):
        pairs.is_whole = False
        pairs.shapes |= {shape for slot in stateful if (shape := _shape(slot))}


def _take_flat(
    files: list[tuple[str, Layout]],
    taken: set[int],
    containers: list[_Container],
    roles: dict[int, Role],
    pairs: _Pairs,
) -> None:
    """Give roles to moments that have their keys in their names, and to their weights."""
    named = {id(tensor) for container in containers for tensor in container.tensors}
    flat = list(find_flat(files, taken, named))
    ends = _ends(containers) if flat else {}
    for slot in flat:
        if slot.state.keys() <= DIVIDING:
            continue  # without the average that it divides, the step error is unknown
        owner = _owner(slot, ends, pairs.paired)
        if owner is not None or (slot.is_optimizers and _is_complete(slot)):
            _take_slot(slot, roles, BESIDE)
        if owner is not None:
            _join(slot, owner, roles, pairs.paired)


def _owner(
    slot: Slot, ends: Mapping[str, list[tuple[StoredTensor, str]]], paired: set[int]
) -> StoredTensor | None:
    """Return the weight of a flat slot: the tensor beside it, or one with its name."""
    if slot.weight is not None:
        return slot.weight
    owner = _named(slot, ends)
    # Statistics can have such names too.  A weight with other moments is then not their weight.
    return owner if slot.is_optimizers or id(owner) not in paired else None


def _is_complete(slot: Slot) -> bool:
    """Return whether a slot that is not doubtful has an average and the moment that divides it."""
    return not slot.doubtful and any(
        not slot.state.keys().isdisjoint(FIRST.get(key, ())) for key in slot.state
    )


def _refuse_shared(
    roles: dict[int, Role], files: list[tuple[str, Layout]], containers: list[_Container]
) -> None:
    """Make storages exact that a weight or a moment shares with another tensor."""
    for number, (_, layout) in enumerate(files):
        beside = [container for container in containers if container.file == number]
        for tensor in layout.tensors:
            role = roles[id(tensor)]
            if role.role != OTHER and tensor.views and not _is_sound(role, tensor, beside):
                role.role, role.evidence, role.pair = OTHER, "", None
    for role in roles.values():
        if role.pair is not None and roles[id(role.pair)].role != WEIGHT:
            role.pair = None


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


def _default_role(path: str, tensor: StoredTensor) -> Role:
    stem = PurePosixPath(path).name
    top = tensor.name.split(".")[0].lower()
    unnamed = not tensor.key or tensor.name.startswith("storage.")
    if unnamed or stem.startswith(_REST_FILES) or top in _REST_KEYS or "rng" in top.split("_"):
        return Role("rest", OTHER)
    return Role("optimizer" if stem.startswith("optimizer") else "model", OTHER)


def _take_optimizer(optimizer: Optimizer, roles: dict[int, Role]) -> None:
    """Set the part of all tensors of an optimizer, and the roles of its slots."""
    for tensor in optimizer.tensors:
        roles[id(tensor)].part = "optimizer"
    for slot in optimizer.slots:
        _take_slot(slot, roles, OPTIMIZER)


def _take_slot(slot: Slot, roles: dict[int, Role], evidence: str) -> None:
    """Set the roles of a parameter's states: moments, or float32 weights (part `model`)."""
    for key, tensor in slot.state.items():
        role = roles[id(tensor)]
        weight = key in MASTERS and tensor.dtype == "F32"
        weight |= key in ITERATES and "n" not in slot.state  # z of FTRL is a sum of gradients
        role.part = "model" if weight else "optimizer"
        role.role = WEIGHT if weight else OTHER if slot.closed else key
        role.rule, role.parameter, role.evidence = slot.rule, id(slot), evidence
    if slot.weight is not None:
        role = roles[id(slot.weight)]
        role.part, role.role, role.evidence = "model", WEIGHT, PAIRED


def _join(slot: Slot, weight: StoredTensor, roles: dict[int, Role], paired: set[int]) -> None:
    paired.add(id(weight))
    roles[id(weight)].role, roles[id(weight)].evidence = WEIGHT, PAIRED
    for tensor in slot.state.values():
        if tensor.shape == weight.shape:
            roles[id(tensor)].pair = weight


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
    same = [tensor for tensor in container.tensors if tensor.shape in shapes]
    named = [tensor for tensor in same if is_parameter(container.names[id(tensor)])]
    known = {tensor.shape for tensor in named}
    return named + [tensor for tensor in same if tensor.shape not in known] or container.tensors


def _take_container(container: _Container, roles: dict[int, Role], pairs: _Pairs) -> None:
    """Set the roles of the weights in a state dict.

    With a module, its parameters are the weights.  Otherwise the paired tensors are; if none is
    paired, all tensors are.  Tensors that fit unpaired parameters of an optimizer are weights too.
    """
    if container.module:
        for tensor in container.tensors:
            if _is_in(container.module, container.names[id(tensor)]):
                roles[id(tensor)].role, roles[id(tensor)].evidence = WEIGHT, MODULE
        return
    paired = any(id(tensor) in pairs.paired for tensor in container.tensors)
    if container.doubtful or (pairs.is_whole and paired):
        return
    for tensor in _fitting(container, pairs.shapes):
        if roles[id(tensor)].role != WEIGHT:
            roles[id(tensor)].role, roles[id(tensor)].evidence = WEIGHT, STATE_DICT


# -- state dicts of models -------------------------------------------------------------------------


def _containers(
    path: str, layout: Layout, file: int, roles: dict[int, Role], taken: set[int], names: Names
) -> Iterator[_Container]:
    """Yield the state dicts of models in a file, the outermost first."""
    known = {tensor.key: tensor for tensor in layout.tensors if tensor.key}
    used = set(taken)
    for steps, node in walk(layout.tree, (dict,)):
        if not isinstance(node, dict) or not is_place(path, layout.format, steps, node):
            continue
        inside: dict[int, str] = {}
        tensors = []
        for tensor, name in _candidates(leaves_of(node) or [], known):
            if id(tensor) not in used and roles[id(tensor)].is_open:
                used.add(id(tensor))
                tensors.append(tensor)
                inside[id(tensor)] = name
        if tensors:
            place, doubtful = ".".join(steps), may_be_buffers(node)
            given = names.get((path, place), []) if layout.format != "safetensors" else []
            module = frozenset(name for row in given for name in row if name)
            yield _Container(place, file, tensors, inside, module, doubtful)


def _candidates(
    leaves: list[tuple[str, str]], known: Mapping[str, StoredTensor]
) -> Iterator[tuple[StoredTensor, str]]:
    """Yield the tensors of a state dict that may be weights, each with its first name there."""
    names = {name for name, _ in leaves}
    first: dict[str, str] = {}
    for name, key in leaves:
        first.setdefault(key, name)
    for key, name in first.items():
        tensor = known.get(key)
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
    own = [container for container in containers if container.file == optimizer.file]
    if any(slot.names for slot in slots):
        # Shards of a weight share a name: prefer the file of the optimizer.
        return _pair_by_name(slots, own) or _pair_by_name(slots, containers)
    fitting = {
        container.place: pairs
        for container in own
        if (pairs := _pair_by_order(optimizer.groups, container.tensors))
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


def _ends(containers: Iterable[_Container]) -> dict[str, list[tuple[StoredTensor, str]]]:
    """Return a map from each end of a name to its tensors, each with its container's place."""
    ends: dict[str, list[tuple[StoredTensor, str]]] = {}
    for container in containers:
        for tensor in container.tensors:
            names = {container.names[id(tensor)], tensor.name, *(v.name for v in tensor.views)}
            for end in {
                ".".join(steps[start:])
                for steps in (name.split(".") for name in names)
                for start in range(len(steps))
            }:
                ends.setdefault(end, []).append((tensor, container.place))
    return ends


def _named(slot: Slot, ends: Mapping[str, list[tuple[StoredTensor, str]]]) -> StoredTensor | None:
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
        known = [(slot, shape) for slot in group if (shape := _shape(slot)) is not None]
        wanted = [shape for _, shape in known]
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
            (slot, weights[position]) for (slot, _), position in zip(known, first, strict=True)
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
