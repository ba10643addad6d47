"""A reader made from docs/format.md alone: struct, json, numpy, zstandard, blake3; no ckptvcs.

SpecRepository(".ckpt").file(commit, path) -> bytes
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from blake3 import blake3

KINDS = dict(
    enumerate(
        [
            *("commit", "schema", "values", "skeleton", "recipe", "record", "bundle", "errors"),
            *("note", "provenance"),
        ],
        start=1,
    )
)
SIZES = {
    **dict.fromkeys(
        ["I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "F4"],
        (1, 1),
    ),
    **dict.fromkeys(["I16", "U16", "F16", "BF16"], (2, 2)),
    **dict.fromkeys(["I32", "U32", "F32"], (4, 4)),
    **dict.fromkeys(["I64", "U64", "F64"], (8, 8)),
    "C32": (4, 2), "C64": (8, 4), "C128": (16, 8),
}  # fmt: skip
FLOATING = {"F16", "F32", "F64", "BF16", "C32", "C64", "C128"}
CODE: dict[str, Any] = {
    **dict.fromkeys(["branch", "dirty", "diff"]),
    "changed": [],
    "untracked": [],
    "complete": True,
}
SLICE = 1 << 20
Array = np.ndarray[Any, Any]


def b3(data: bytes, length: int = 32) -> bytes:
    return blake3(data).digest(length)


def unsealed(data: bytes) -> Any:
    fields = json.loads(data)
    check = fields.pop("check", None)  # not there in the oldest repositories
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    assert check in (None, b3(canonical, 16).hex())
    return fields


FLAGS = {"archive", "near", "near-2", "notes", "patches", "provenance", "sparse", "types"}


def archive(path: Path) -> tuple[dict[str, Any], SpecRepository]:
    """The manifest of an archive, and a reader of its objects."""
    data = path.read_bytes()
    assert struct.unpack_from("<8sHHI", data) == (b"CKPTARCH", 1, 0, 0)
    start, length, digest, end = struct.unpack("<QQ32s8s", data[-56:])
    assert (end, digest) == (b"CKPTAEND", b3(data[:-56]))
    assert start + length + 56 == len(data)
    manifest = json.loads(data[start : start + length])
    assert set(manifest["flags"]["read"]) <= FLAGS
    at, packs = 16, {}
    for pack in manifest["packs"]:
        packs[pack["id"]] = data[at : at + pack["bytes"]]
        at += pack["bytes"]
    assert at == start
    spec = SpecRepository(path, packs)
    rows = (row["form"] for row in manifest["commits"] if "form" in row)
    spec.forms = {row["commit"]: row["parts"] for row in rows}
    return manifest, spec


class SpecRepository:
    """Reads every object of a repository, or of the packs of an archive, into memory."""

    def __init__(self, folder: Path, packs: dict[str, bytes] | None = None) -> None:
        self.folder = folder
        self.records: dict[bytes, tuple[int, int, bytes, int, bytes, bytes]] = {}
        if packs is None:
            head = unsealed((folder / "format").read_bytes().removesuffix(b"\n"))
            assert head["format"] == 1
            assert set(head["flags"]["read"]) <= FLAGS
            paths = [*folder.glob("packs/*/*.pack"), *folder.glob("meta/*/*.pack")]
            assert all(path.parent.name == path.stem[:2] for path in paths)
            packs = {path.stem: path.read_bytes() for path in paths}
        for pack, data in packs.items():
            self._pack(pack, data)
        self.objects = {name: self._content(name) for name in self.records}
        self.recipes: dict[str, list[dict[str, Any]]] = {}
        self.forms: dict[str, dict[str, str]] = {}  # those of a bundle file
        for name, (kind, *_) in self.records.items():
            if KINDS[kind] == "recipe":
                recipe = json.loads(self.objects[name])
                self.recipes.setdefault(recipe["values"], []).append(recipe)

    def _pack(self, name: str, data: bytes) -> None:
        assert b3(data).hex() == name
        magic, version, flags, zero = struct.unpack_from("<8sHHI", data)
        assert (magic, version, flags, zero) == (b"CKPTPACK", 1, 0, 0)
        toc_at, toc_size, _, toc_hash, end = struct.unpack_from("<QQ16s32s8s", data, len(data) - 72)
        toc = data[toc_at : toc_at + toc_size]
        assert (end, b3(toc)) == (b"CKPTEND1", toc_hash)
        for at in range(0, toc_size, 104):
            (offset,) = struct.unpack_from("<Q", toc, at)
            head = toc[at + 8 : at + 104]
            assert data[offset : offset + 96] == head
            assert struct.unpack_from("<I", data, offset + 96)[0] == zlib.crc32(head)
            mark, kind, encoding, _, own, base, region, raw, stored = struct.unpack(
                "<4sBBH32s32sQQQ", head
            )
            assert mark == b"CKOB"
            payload = data[offset + 100 : offset + 100 + stored]
            self.records[own] = (
                kind, encoding, base, raw, payload, data[offset - region : offset],
            )  # fmt: skip

    def _content(self, name: bytes) -> bytes:
        kind, encoding, base, raw, payload, _ = self.records[name]
        content = payload
        if encoding == 1:
            content = zstandard.ZstdDecompressor().decompress(payload)
        elif encoding == 2:
            dictionary = zstandard.ZstdCompressionDict(
                self._content(base), dict_type=zstandard.DICT_TYPE_RAWCONTENT
            )
            content = zstandard.ZstdDecompressor(dict_data=dictionary).decompress(payload)
        assert len(content) == raw
        assert b3(KINDS[kind].encode() + b"\0" + content) == name
        return content

    def json(self, name: str) -> dict[str, Any]:
        """The content of an object that is JSON."""
        value = json.loads(self.objects[bytes.fromhex(name)])
        assert isinstance(value, dict)
        return value

    def branch(self, name: str) -> str:
        """The commit of a branch of a plain name."""
        newest = max((self.folder / "refs" / "heads" / name).iterdir())
        fields = unsealed(newest.read_bytes())
        assert fields["generation"] == int(newest.name)
        commit = fields["commit"]
        assert isinstance(commit, str)
        return commit

    def line(self, commit: str | None) -> list[str]:
        """A commit and its ancestors, newest first."""
        found = []
        while commit is not None:
            found.append(commit)
            parents = self.json(commit)["parents"]
            commit = parents[0] if parents else None
        return found

    def provenance(self, commit: str) -> dict[str, Any] | None:
        """The provenance of a commit."""
        name = self.json(commit).get("provenance")
        if name is None:
            return None
        assert KINDS[self.records[bytes.fromhex(name)][0]] == "provenance"
        found: dict[str, Any] = {"packages": {}, "gpus": [], "runs": {}, "argv": None, "code": None}
        found |= self.json(name)
        if found["code"] is not None:
            found["code"] = CODE | found["code"]
        return found

    def noted(self, commit: str) -> dict[str, Any]:
        """The message, metrics and fields of a commit with its notes."""
        notes = []
        for name, (kind, *_) in self.records.items():
            if KINDS[kind] == "note":
                note = json.loads(self.objects[name])
                assert len(self.objects[name]) <= 1 << 16
                assert note["generation"] >= 1
                if note["commit"] == commit:
                    notes.append((note["generation"], note["time"], name, note))
        made = self.json(commit)
        found = {"message": made["message"], "metrics": dict(made["metrics"]), "fields": {}}
        for *_, note in sorted(notes, key=lambda row: row[:3]):
            found["message"] = note.get("message", found["message"])
            for what in ("metrics", "fields"):
                for key, value in note.get(what, {}).items():
                    found[what].pop(key, None)
                    if value is not None:
                        found[what][key] = value
        return found

    # -- tensors -------------------------------------------------------------------------------

    def _recipe(self, values: str) -> dict[str, Any]:
        return max(self.recipes[values], key=lambda r: (not r.get("patch", False), r["generation"]))

    def _frame(self, values: str, tensor: int) -> tuple[str, int, dict[str, Any]]:
        recipe = self._recipe(values)
        bundle = recipe["bundles"][recipe["owners"][tensor]]
        number = recipe["frames"][tensor]
        return bundle, number, self.json(bundle)["frames"][number]

    def _slices(self, bundle: str, number: int) -> list[bytes]:
        region = self.records[bytes.fromhex(bundle)][5]
        at = 0
        for position, frame in enumerate(self.json(bundle)["frames"]):
            out = []
            for index, length in enumerate(frame["lengths"]):
                at = frame["starts"][index] if "starts" in frame else at
                data = region[at : at + length]
                expected = frame["hashes"][32 * index : 32 * index + 32]
                assert b3(data, 16).hex() == expected or (data[0] == 11 and int(expected, 16) == 0)
                out.append(data)
                at += length
            if position == number:
                return out
        raise AssertionError

    def tensor(self, values: str, tensor: int, dtype: str, size: int) -> bytes:
        """The `size` bytes of a tensor of a table of values."""
        assert bytes.fromhex(values) in self.objects
        return self._decode(values, tensor, dtype, size)

    def _decode(self, values: str, tensor: int, asked: str, size: int) -> bytes:
        """The same of one that others stand on, whose table may be gone; a frame that names no type
        has the one that is asked for, or else another.
        """
        recipe = self._recipe(values)
        if recipe["owners"][tensor] == len(recipe["bundles"]):
            return self._between(recipe, recipe["frames"][tensor], asked, size)
        bundle, number, frame = self._frame(values, tensor)
        own = frame.get("dtype", self.json(bundle).get("dtype"))
        table = self.objects.get(bytes.fromhex(values))
        for dtype in [own] if own else [asked, *SIZES]:
            try:
                out = self._frame_bytes(bundle, number, dtype, size)
            except (AssertionError, ValueError, LookupError, struct.error, zstandard.ZstdError):
                if own:
                    raise
                continue
            if table is None or b3(out) == table[32 * tensor :][:32]:
                return out
        raise AssertionError(f"{values} {tensor}")

    def _between(self, recipe: dict[str, Any], position: int, dtype: str, size: int) -> bytes:
        """An interpolated tensor."""
        part, whole = recipe["share"]
        assert 0 < part < whole < 1 << 24
        dtype = {"C64": "F32", "C128": "F64"}.get(dtype, dtype)
        ends = []
        for table in recipe["ends"]:
            self._frame(table, position)
            words = np.frombuffer(
                self._decode(table, position, dtype, size), f"<u{SIZES[dtype][1]}"
            )
            double = words.view("<f8") if dtype == "F64" else to_float(words, dtype)
            ends.append(double.astype(np.float64))
        mean = ((whole - part) * ends[0] + part * ends[1]) / whole
        if dtype == "F64":
            return bytes(mean.tobytes())
        return bytes(to_words(mean.astype(np.float32), dtype).tobytes())

    def _frame_bytes(self, bundle: str, number: int, dtype: str, size: int) -> bytes:
        frame, word = self.json(bundle)["frames"][number], SIZES[dtype][1]
        assert size % word == 0
        words, base = size // word, None
        if "base" in frame:
            table, position = frame["base"]
            below = self.json(bundle)["bases"][table]
            assert self._frame(below, position)[2].get("depth", 0) < frame["depth"]
            base = np.frombuffer(self._decode(below, position, dtype, size), f"<u{word}")
        companions = None
        if "companion" in frame:
            companions = self._companions(bundle, frame["companion"], words)
        slices = self._slices(bundle, number)
        assert len(slices) == -(-words // SLICE)
        parts = []
        for index, data in enumerate(slices):
            count = min(SLICE, words - index * SLICE)
            window = None if base is None else base[index * SLICE : index * SLICE + count]
            companion = None if companions is None else companions[index]
            parts.append(decode_slice(data, dtype, count, window, companion))
        return b"".join(part.tobytes() for part in parts)

    def _companions(self, bundle: str, number: int, words: int) -> list[tuple[bytes, Array | None]]:
        """The slices of a companion, and the words that each stands on."""
        frame = self.json(bundle)["frames"][number]
        assert "companion" not in frame
        base = None
        if "base" in frame:
            table, position = frame["base"]
            below = self.json(bundle)["bases"][table]
            base = np.frombuffer(self._decode(below, position, "F32", 4 * words), "<u4")
        return [
            (data, None if base is None else base[index * SLICE : (index + 1) * SLICE])
            for index, data in enumerate(self._slices(bundle, number))
        ]

    def archived(self) -> dict[str, dict[str, str]]:
        """The values of the archived parts of each commit."""
        kinds = {name.hex(): KINDS[kind] for name, (kind, *_) in self.records.items()}
        made = {name: self.json(name) for name, kind in kinds.items() if kind == "record"}
        undone = {old for record in made.values() for old in record.get("undoes", ())}
        found: dict[str, dict[str, str]] = {}
        for name, record in sorted(made.items(), key=lambda row: row[1]["time"]):
            if name not in undone:
                found |= {row["commit"]: row["parts"] for row in record.get("archived", ())}
        return found

    def file(self, commit: str, path: str) -> bytes:
        """The bytes of a file of a commit (in near form where no patch is left)."""
        made = self.json(commit)
        tensors = self.json(made["schema"])["tensors"]
        forms = (self.forms | self.archived()).get(commit, {})
        entry = next(file for file in made["files"] if file["path"] == path)
        places: dict[int, tuple[str, int]] = {}
        for part, state in made["parts"].items():
            stored = [n for n, t in enumerate(tensors) if t["part"] == part and not t.get("inline")]
            # A recipe for the exact values is there as long as their patch is.
            table = state.get("exact") if state.get("exact") in self.recipes else state["values"]
            table = forms.get(part, table)
            places |= {n: (table, position) for position, n in enumerate(stored)}

        def raw(number: int) -> bytes:
            info = tensors[number]
            size = int(np.prod(info["shape"], dtype=np.int64)) * SIZES[info["dtype"]][0]
            return self.tensor(*places[number], info["dtype"], size)

        skeleton = self.objects[bytes.fromhex(entry["skeleton"])]
        (length,) = struct.unpack_from("<I", skeleton)
        segments = json.loads(skeleton[4 : 4 + length])["segments"]
        literals, at, out = skeleton[4 + length :], 0, []
        for op, argument in zip(segments[::2], segments[1::2], strict=True):
            if op == 1:
                out.append(raw(argument))
            elif op == 2:
                out.append(struct.pack("<I", zlib.crc32(raw(argument))))
            else:
                count = argument
                if op == 3:
                    info = tensors[argument]
                    elements = int(np.prod(info["shape"], dtype=np.int64))
                    count = elements * SIZES[info["dtype"]][0]
                out.append(literals[at : at + count])
                at += count
        assert at == len(literals)
        return b"".join(out)


# -- slices ------------------------------------------------------------------------------------


class Stream:
    """Reads fields one after another."""

    def __init__(self, data: bytes, *, short: bool = False) -> None:
        self.data, self.at, self.short = data, 0, short

    def take(self, layout: str) -> tuple[Any, ...]:
        fields = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return fields

    def octets(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]

    def head(self) -> tuple[int, int]:
        (first,) = self.take("<B")
        return first, int.from_bytes(self.octets(3 if self.short else 4), "little")

    def section(self, count: int) -> bytes:
        tag, length = self.head()
        data = self.octets(length)
        if tag == 1:
            form = zstandard.FORMAT_ZSTD1_MAGICLESS if self.short else zstandard.FORMAT_ZSTD1
            data = zstandard.ZstdDecompressor(format=form).decompressobj().decompress(data)
        elif tag == 2:
            data = data * count
        assert len(data) == count
        return data

    def mask(self, count: int) -> Array:
        form, size = self.head()
        unary = form in (3, 4)
        data = self.octets(size) if unary else self.section(size)
        if form == 0:
            return np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(bool)
        gaps, gap = [], 0
        if unary:
            data = np.unpackbits(np.frombuffer(data, np.uint8)).tobytes()
        for byte in data:
            gap += 1 - byte if unary else byte
            if byte == 1 if unary else byte != 255:
                gaps.append(gap)
                gap = 0
        between = np.asarray(gaps, np.int64)
        if form >= 2:
            (shift,) = self.take("<B")
            if form == 4:
                size = between.size * shift
                packed = np.frombuffer(self.octets((size + 7) // 8), np.uint8)
                rows = np.unpackbits(packed, count=size).reshape(between.size, shift)
                low = rows @ (1 << np.arange(shift, dtype=np.int64)[::-1])
            else:
                low = self.bits(between.size, shift)
            between = (between << shift) + low
        kept = np.zeros(count, bool)
        kept[np.cumsum(between + 1) - 1] = True
        return kept

    def words(self, count: int) -> Array:
        planes = [np.frombuffer(self.section(count), np.uint8) for _ in range(4)]
        return np.stack(planes, axis=1).reshape(-1).view("<u4")

    def bits(self, count: int, planes: int) -> Array:
        out = np.zeros(count, np.int64)
        each = (count + 7) // 8
        data = np.frombuffer(self.octets(planes * each), np.uint8)
        for bit in range(planes):
            row = np.unpackbits(data[bit * each : (bit + 1) * each], count=count)
            out |= row.astype(np.int64) << bit
        return out

    def codes(self, count: int) -> Array:
        (form,) = self.take("<B")
        out = np.zeros(count, np.int64)
        if form in (0, 2):
            kept = np.flatnonzero(self.mask(count))
            sign = 1 - 2 * self.bits(kept.size, 1)
            size = np.ones(kept.size, np.int64)
            (planes,) = self.take("<B")
            above = np.arange(kept.size)
            more = form == 0 or planes >= 128
            for _ in range(planes if form == 0 else planes % 128):
                above = above[self.mask(above.size)]
                size[above] += 1
            (left,) = self.take("<I") if more else (0,)
            if left:
                assert left == above.size
                size[above] += self.words(left)
            out[kept] = sign * size
        else:
            (shift,) = self.take("<B")
            out += self.bits(count, shift)
            high = np.frombuffer(self.section(count), np.uint8).astype(np.int64)
            out += (high - 128) << shift
            (outliers,) = self.take("<I")
            assert outliers == np.count_nonzero(high == 0)
            if outliers:
                out[high == 0] = self.words(outliers).view("<i4")
        return out

    def values(self, count: int) -> Array:
        (size,) = self.take("<B")
        table = np.frombuffer(self.octets(2 * size), "<f2").astype(np.float32)
        codes = np.frombuffer(self.section(count), np.uint8)
        return table[codes] if count else np.empty(0, np.float32)


def to_float(words: Array, dtype: str) -> Array:
    if dtype == "BF16":
        return (words.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F64":
        return words.view(np.float64).astype(np.float32)
    return words.view({"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)


def to_words(values: Array, dtype: str) -> Array:
    if dtype == "F64":
        return values.astype(np.float64).view(np.uint64)
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    out = np.empty(values.size, np.uint16)
    for number, bits in enumerate(values.view(np.uint32).tolist()):
        low, high = bits & 0xFFFF, bits >> 16
        out[number] = high + (low > 0x8000 or (low == 0x8000 and high & 1))
    return out


def decode_slice(
    data: bytes, dtype: str, count: int, base: Array | None,
    companion: tuple[bytes, Array | None] | None,
) -> Array:  # fmt: skip
    method, stream = data[0], Stream(data[1:], short=4 <= data[0] <= 10)
    if method == 11:
        out = patch(stream, dtype, count, base)
        assert stream.at == len(stream.data)
        return out
    if method >= 4:
        out = near(method, stream, dtype, count, base, companion)
        assert stream.at == len(stream.data)
        return out
    if method == 0:
        return lossless(stream, dtype, count, base)
    if method == 1:
        assert base is not None
        mask = stream.mask(count)
        out = base.copy()
        values = stream.values(int(mask.sum()))
        out[mask] = to_words(to_float(base[mask], dtype) + values, dtype)
    else:
        if method == 2:
            mask = stream.mask(count)
        else:
            assert method == 3
            assert companion is not None
            assert companion[0][0] == 2
            mask = Stream(companion[0][1:]).mask(count)
        out = np.zeros(count, f"<u{SIZES[dtype][1]}")
        out[mask] = to_words(stream.values(int(mask.sum())), dtype)
    assert stream.at == len(stream.data)
    return out


def patch(stream: Stream, dtype: str, count: int, base: Array | None) -> Array:
    assert base is not None
    word = SIZES[dtype][1]
    (form,) = stream.take("<B")
    if form == 0:
        return base
    if form == 1:
        return np.frombuffer(stream.octets(count * word), f"<u{word}")
    if form == 3:
        return sparse(stream, dtype, count, base)
    assert form == 2
    (raw,) = stream.take("<B")
    planes = np.zeros((word, count), np.uint8)
    for plane in planes[:raw]:
        plane[:] = np.frombuffer(stream.octets(count), np.uint8)
    mask = stream.mask(count)
    for plane in planes[raw:]:
        plane[mask] = np.frombuffer(stream.octets(int(mask.sum())), np.uint8)
    words = np.ascontiguousarray(planes.T).reshape(-1).view(f"<u{word}")
    return undo_difference(words, base, dtype)


ROOTS = np.array([0x3F800000, 0x3F9837F0, 0x3FB504F3, 0x3FD744FD], np.uint32).view(np.float32)


def power(numerator: Array, parts: int) -> Array:
    """2^(numerator / parts) from the table of roots, for parts 2 or 4."""
    scale = np.exp2((numerator // parts).astype(np.float32))
    out: Array = ROOTS[numerator % parts * (4 // parts)] * scale.astype(np.float32)
    return out


def near(
    method: int, stream: Stream, dtype: str, count: int, base: Array | None,
    companion: tuple[bytes, Array | None] | None,
) -> Array:  # fmt: skip
    word = np.dtype(f"<u{SIZES[dtype][1]}")
    if method == 8:
        assert companion is not None
        master = decode_slice(companion[0], "F32", count, companion[1], None)
        return to_words(master.view(np.float32), dtype)
    if method == 5:
        low, columns, start = stream.take("<hII")
        rows = -(-(start + count) // columns)
        row = np.frombuffer(stream.section(rows + columns), np.uint8).astype(np.int64)
        place = start + np.arange(count)
        one, other = row[place // columns], row[rows + place % columns]
        factors = power(np.maximum(low + one - 1, -252), 2), power(np.maximum(other - 1, 0), 2)
        values = np.where((one > 0) & (other > 0), factors[0] * factors[1], np.float32(0))
        return to_words(values, dtype)
    if method in (9, 10):
        columns, start, rank, scale = stream.take("<IIBf")
        rows = -(-(start + count) // columns)
        stored = np.frombuffer(stream.section(rank * (rows + columns)), np.uint8)
        both = stored.astype(np.int64) - 128
        left, right = both[: rank * rows].reshape(rows, rank), both[rank * rows :]
        place = start + np.arange(count)
        dots = (left @ right.reshape(rank, columns))[place // columns, place % columns]
        values = dots.astype(np.float32) * np.float32(scale)
        if method == 10:
            return to_words(values, dtype)
        assert companion is not None
        second = decode_slice(companion[0], dtype, count, companion[1], None)
        return to_words(values * np.sqrt(to_float(second, dtype)), dtype)
    factor = None
    if method == 4:
        grid, step, levels, columns, start = stream.take("<hfBII")
        table = np.frombuffer(stream.octets(2 * levels), "<u2").astype(np.float32)
        if columns:
            place = start + np.arange(count)
            rows = int(place[-1]) // columns + 1
            stored = np.frombuffer(stream.section(rows), np.uint8).astype(np.int64)
            factor = power(stored - 128, 4)[place // columns]
    else:
        step, levels = stream.take("<fB")
        table = np.frombuffer(stream.octets(4 * levels), "<f4")
    codes = stream.codes(count)
    size = np.abs(codes)
    amount = size.astype(np.float32) * np.float32(step)
    for level in range(1, levels + 1):
        amount[size == level] = table[level - 1]
    sign = np.sign(codes).astype(np.float32)
    if method == 4:
        amount = np.rint(amount if factor is None else amount * factor)
        before = np.zeros(count, np.float32) if base is None else to_float(base, dtype)
        at = np.rint(before * np.float32(2.0**grid)) + sign * amount
        values = at * np.float32(2.0**-grid)
    else:
        values = sign * amount
        if method == 7:
            assert companion is not None
            second = decode_slice(companion[0], dtype, count, companion[1], None)
            values = values * np.sqrt(to_float(second, dtype))
    elsewhere = np.zeros(count, word) if base is None or method != 4 else base
    return np.where(codes != 0, to_words(values, dtype), elsewhere)


def lossless(stream: Stream, dtype: str, count: int, base: Array | None) -> Array:
    word = SIZES[dtype][1]
    (transform,) = stream.take("<B")
    if transform == 3:
        return sparse(stream, dtype, count, base)
    planes = [np.frombuffer(stream.section(count), np.uint8) for _ in range(word)]
    assert stream.at == len(stream.data)
    words = np.stack(planes, axis=1).reshape(-1).view(f"<u{word}")
    bits = 8 * word
    one = words.dtype.type(1)
    if transform == 0:
        return words
    if transform == 1:
        rotated: Array = (words >> one) | (words << words.dtype.type(bits - 1))
        return rotated
    assert base is not None
    return undo_difference(words, base, dtype)


def sparse(stream: Stream, dtype: str, count: int, base: Array | None) -> Array:
    assert base is not None
    stream.short = True
    word = SIZES[dtype][1]
    mask = stream.mask(count)
    planes = np.zeros((word, count), np.uint8)
    for plane in planes:
        plane[mask] = np.frombuffer(stream.section(int(mask.sum())), np.uint8)
    assert stream.at == len(stream.data)
    words = np.ascontiguousarray(planes.T).reshape(-1).view(f"<u{word}")
    return undo_difference(words, base, dtype)


def undo_difference(words: Array, base: Array, dtype: str) -> Array:
    bits = 8 * words.itemsize
    one = words.dtype.type(1)

    def order(x: Array) -> Array:
        if dtype not in FLOATING:
            return x
        top = x >> x.dtype.type(bits - 1)
        return np.where(top == 1, x ^ x.dtype.type((1 << (bits - 1)) - 1), x)

    difference = (words >> one) ^ (words.dtype.type(0) - (words & one))
    out: Array = order(difference + order(base))
    return out
