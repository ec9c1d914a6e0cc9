"""Workflows out of files: JSON in both forms, and pictures and videos that carry one in their metadata.

Files come from anywhere, so everything is bounded: how much text is unpacked, how deep and how large the JSON is. Nothing in
a file is ever taken for a path, and no pixel or frame is decoded.
"""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image, PngImagePlugin

from .errors import WorkflowError
from .workflow import is_ui_workflow

MOST_TEXT = 32 * 2**20  # bytes of JSON; the largest workflows people share have one or two million
MOST_DEPTH = 64  # of nested lists and objects; real workflows stay below 15
MOST_VALUES = 500_000
MOST_ELEMENTS = 20_000  # boxes or elements of a video's structure that are looked at
UI_KEY, API_KEY = "workflow", "prompt"
# Where the savers in use put it: ComfyUI's own under its two keys, VideoHelperSuite as one JSON object in the comment.
COMMENTS = ("comment", "COMMENT", "©cmt")
EXIF_IFD = 0x8769
USER_COMMENT = 0x9286
Json = dict[str, Any]


def read_carried(data: bytes, name: str) -> Json:
    """The workflow in a file (UI or API JSON out of .json, .png, .webp, .mp4, .mov, .webm or .mkv); `name` is for messages.

    What the bytes are decides, not the name. Where both forms are there the UI form is returned, unless it holds subgraphs,
    which only the API form has unfolded. Raises `WorkflowError` in words for everything else.
    """
    carrier = _carrier(data)
    if carrier is None:
        if not data.strip():
            raise WorkflowError(f"{name} is empty.")
        return workflow_of(parse(data, name), name)
    kind, read = carrier
    try:
        texts = read(data)
    except (OSError, ValueError, SyntaxError, struct.error, IndexError, OverflowError) as error:
        raise WorkflowError(f"{name} is a damaged {kind}, so its workflow cannot be read.") from error
    forms = {key: parse(text, f"The {key} in {name}") for key, text in texts.items()}
    if not forms:
        raise WorkflowError(
            f"{name} is a {kind} without a workflow: it was not saved by ComfyUI, or its metadata were stripped on the way."
        )
    ui = forms.get(UI_KEY)
    if ui is not None and (API_KEY not in forms or (is_ui_workflow(ui) and not _subgraphs(ui))):
        return workflow_of(ui, name)
    return workflow_of(forms[API_KEY], name)


def parse(text: str | bytes, what: str) -> Any:
    """JSON within the bounds of this module; NaN and infinity, which ComfyUI writes, become null as in its editor."""
    if len(text) > MOST_TEXT:
        raise WorkflowError(f"{what} holds more than {MOST_TEXT // 2**20} MiB of text, which no workflow needs.")
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        document = json.loads(text, parse_constant=lambda _: None, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise WorkflowError(f"{what} is not a JSON file, and no picture or video that can carry a workflow.") from error
    except RecursionError as error:
        raise WorkflowError(f"{what} is nested too deep to be a workflow.") from error
    except ValueError as error:
        raise WorkflowError(f"{what} is not JSON.") from error
    _bounded(document, what)
    return document


def workflow_of(document: Any, name: str) -> Json:
    """The document if it is a workflow in either form; API nodes get the inputs they may have left out."""
    if isinstance(document, dict) and isinstance(document.get("prompt"), dict) and "nodes" not in document:
        document = document["prompt"]  # what the editor posts to the server
    if is_ui_workflow(document):
        return document
    nodes = document.values() if isinstance(document, dict) else ()
    if not nodes or not all(isinstance(node, dict) and isinstance(node.get("class_type"), str) for node in nodes):
        raise WorkflowError(f"{name} is not a ComfyUI workflow: neither what its editor saves nor what its server runs.")
    for key, node in document.items():
        if not isinstance(node.get("inputs", {}), dict):
            raise WorkflowError(f"{name}: the inputs of node {key} are no names with values.")
    return {key: {**node, "inputs": node.get("inputs", {})} for key, node in document.items()}


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _bounded(document: Any, what: str) -> None:
    """Refuse what would break later readers: too deep, too many values, text that is no Unicode."""
    level, values = [document], 0
    for _ in range(MOST_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                _encodable(value, what)
            elif isinstance(value, dict):
                for key in value:
                    _encodable(key, what)
                below += value.values()
            elif isinstance(value, list):
                below += value
        values += len(level)
        if values > MOST_VALUES:
            raise WorkflowError(f"{what} holds more than {MOST_VALUES:,} values, which no workflow needs.")
        if not below:
            return
        level = below
    raise WorkflowError(f"{what} is nested too deep to be a workflow.")


def _encodable(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise WorkflowError(f"{what} holds characters that are no Unicode text.") from error


def _subgraphs(ui: Json) -> bool:
    definitions = ui.get("definitions")
    return isinstance(definitions, dict) and bool(definitions.get("subgraphs"))


# Carriers: each reader returns the JSON texts it found, by UI_KEY and API_KEY


def _carrier(data: bytes) -> tuple[str, Callable[[bytes], dict[str, str | bytes]]] | None:
    """What kind of file this is and how it is read, by its first bytes; None for text."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG picture", _from_png
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP picture", _from_webp
    if data[4:8] == b"ftyp":
        return "video", _from_mp4
    if data.startswith(b"\x1aE\xdf\xa3"):
        return "video", _from_matroska
    if data[:3] in (b"\xff\xd8\xff", b"GIF"):
        return "picture of a kind", lambda _: {}
    return None


def _from_png(data: bytes) -> dict[str, str | bytes]:
    """The text chunks; Pillow bounds what compressed ones unpack to, and no pixel is decoded."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        assert isinstance(image, PngImagePlugin.PngImageFile)
        return {key: str(text) for key, text in image.info.items() if key in (UI_KEY, API_KEY) and isinstance(text, str)}


def _from_webp(data: bytes) -> dict[str, str | bytes]:
    """EXIF entries "workflow:{...}" and "prompt:{...}", under whatever tag they stand."""
    with Image.open(io.BytesIO(data), formats=("WEBP",)) as image:
        exif = image.getexif()
        values = [*exif.values(), exif.get_ifd(EXIF_IFD).get(USER_COMMENT)]
    found: dict[str, str | bytes] = {}
    for value in values:
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        key, colon, rest = text.partition(":") if isinstance(text, str) else ("", "", "")
        key = key.removeprefix("ASCII\0\0\0").strip().lower()
        if colon and key in (UI_KEY, API_KEY):
            found.setdefault(key, rest.rstrip("\0"))
    return found


def _from_mp4(data: bytes) -> dict[str, str | bytes]:
    """Tags of an ISO base media file: moov/udta/meta with either named keys or iTunes' names (ISO/IEC 14496-12, QuickTime)."""
    budget = iter(range(MOST_ELEMENTS))
    tags: dict[str, bytes] = {}
    for start, end in _boxes_at(data, 0, len(data), (b"moov",), budget):
        metas = list(_boxes_at(data, start, end, (b"meta",), budget))
        for inner in _boxes_at(data, start, end, (b"udta",), budget):
            metas += _boxes_at(data, *inner, (b"meta",), budget)
        for first, last in metas:
            # In QuickTime files meta has no version and flags before its boxes.
            first += 0 if data[first + 4 : first + 8] == b"hdlr" else 4
            names = _mp4_keys(data, first, last, budget)
            for place, end_of_list in _boxes_at(data, first, last, (b"ilst",), budget):
                for kind, content, limit in _boxes(data, place, end_of_list, budget):
                    name = names.get(int.from_bytes(kind, "big"), kind.decode("latin-1"))
                    for value, value_end in _boxes_at(data, content, limit, (b"data",), budget):
                        tags.setdefault(name, data[value + 8 : min(value_end, value + 8 + MOST_TEXT + 1)])
    return _of_tags(tags)


def _boxes(data: bytes, start: int, end: int, budget: Iterator[int]) -> Iterator[tuple[bytes, int, int]]:
    """Type, content and end of the boxes in data[start:end]."""
    while start + 8 <= end:
        if next(budget, None) is None:
            raise ValueError("more boxes than any video needs")
        size, header = int.from_bytes(data[start : start + 4], "big"), 8
        if size == 1:
            size, header = int.from_bytes(data[start + 8 : start + 16], "big"), 16
        size = end - start if size == 0 else size
        if size < header or start + size > end:
            raise ValueError("a box larger than what it lies in")
        yield data[start + 4 : start + 8], start + header, start + size
        start += size


def _boxes_at(
    data: bytes, start: int, end: int, kinds: tuple[bytes, ...], budget: Iterator[int]
) -> Iterator[tuple[int, int]]:
    """Content and end of the boxes of these types."""
    return ((first, last) for kind, first, last in _boxes(data, start, end, budget) if kind in kinds)


def _mp4_keys(data: bytes, start: int, end: int, budget: Iterator[int]) -> dict[int, str]:
    """Names by number, counted from 1, of a meta box with a `keys` table."""
    names: dict[int, str] = {}
    for first, last in _boxes_at(data, start, end, (b"keys",), budget):
        for number, (_, content, limit) in enumerate(_boxes(data, first + 8, last, budget), start=1):
            names[number] = data[content:limit][:256].decode("utf-8", "replace").rpartition("\0")[2]
    return names


# Matroska and WebM (RFC 8794, RFC 9559): ids of the elements on the way to a tag's name and text
SEGMENT, TAGS, TAG, SIMPLE_TAG, TAG_NAME, TAG_STRING, CLUSTER = (
    0x18538067, 0x1254C367, 0x7373, 0x67C8, 0x45A3, 0x4487, 0x1F43B675,
)  # fmt: skip


def _from_matroska(data: bytes) -> dict[str, str | bytes]:
    """Tags of a Matroska or WebM file."""
    tags: dict[str, bytes] = {}
    budget = iter(range(MOST_ELEMENTS))

    def walk(start: int, end: int) -> None:
        name, text = "", b""
        for kind, content, limit in _elements(data, start, end, budget):
            if kind in (SEGMENT, TAGS, TAG, SIMPLE_TAG):
                walk(content, limit)
            elif kind == TAG_NAME:
                name = data[content : min(limit, content + 256)].decode("utf-8", "replace").strip("\0")
            elif kind == TAG_STRING:
                text = data[content : min(limit, content + MOST_TEXT + 1)]
        if name and text:
            tags.setdefault(name, text)

    try:
        walk(0, len(data))
    except RecursionError as error:
        raise ValueError("tags in tags without end") from error
    return _of_tags(tags)


def _elements(data: bytes, start: int, end: int, budget: Iterator[int]) -> Iterator[tuple[int, int, int]]:
    """Id, content and end of the EBML elements in data[start:end]; one of unknown size reaches to the end."""
    while start < end:
        if next(budget, None) is None:
            raise ValueError("more elements than any video needs")
        kind, start = _vint(data, start, keep_marker=True)
        size, start = _vint(data, start, keep_marker=False)
        if size is None:
            if kind == CLUSTER:
                return  # live recordings; whatever follows cannot be found without reading frames
            size = end - start
        limit = min(start + size, end)  # a recording that broke off promises more than there is
        yield kind or 0, start, limit
        start = limit


def _vint(data: bytes, start: int, keep_marker: bool) -> tuple[int | None, int]:
    """A variable-length integer and the place behind it; None for the reserved "unknown size"."""
    length = 9 - data[start].bit_length()
    raw = data[start : start + length]
    if length > 8 or len(raw) < length:
        raise ValueError("a number that ends nowhere")
    value = int.from_bytes(raw, "big")
    bits = 7 * length
    if keep_marker:
        return value, start + length
    value &= (1 << bits) - 1
    return (None if value == (1 << bits) - 1 else value), start + length


def _of_tags(tags: dict[str, bytes]) -> dict[str, str | bytes]:
    """The JSON texts in a video's tags, whatever the case of their names."""
    lower = {name.lower(): text for name, text in tags.items()}
    found: dict[str, str | bytes] = {key: lower[key] for key in (UI_KEY, API_KEY) if lower.get(key)}
    for name in COMMENTS if not found else ():
        if name in tags:
            both = parse(tags[name], "The comment of the video")
            for key in (UI_KEY, API_KEY):
                value = both.get(key) if isinstance(both, dict) else None
                if value is not None:
                    # One of the two is an object, the other may have been packed as text.
                    found[key] = value if isinstance(value, str) else json.dumps(value)
            break
    return found
