"""Workflows out of files: real carriers give back what they carry, hostile ones a sentence."""

import io
import json
import struct
import time
import tracemalloc
import zlib

import pytest
from PIL import Image, PngImagePlugin

from stretto.web.panel.measure.carried import MOST_DEPTH, read_carried
from stretto.web.panel.measure.errors import WorkflowError

UI = {"nodes": [{"id": 1, "type": "KSampler"}], "links": [], "version": 0.4, "extra": {"name": "Grüße, 世界"}}


def png(compressed=False, **texts):
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text if isinstance(text, str) else json.dumps(text), zip=compressed)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def webp(**texts):
    """As ComfyUI's SaveAnimatedWEBP writes it."""
    image = Image.new("RGB", (8, 8))
    exif = image.getexif()
    for tag, (key, text) in zip((0x0110, 0x010F), texts.items()):
        exif[tag] = f"{key}:{json.dumps(text)}"
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", exif=exif)
    return buffer.getvalue()


def box(kind, *parts):
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + kind + content


def mp4(named=True, large=False, **tags):
    """As FFmpeg writes tags: with named keys (movflags use_metadata_tags), or as iTunes does."""
    hdlr = box(b"hdlr", bytes(8), b"mdta" if named else b"mdir", bytes(13))
    data = [
        box(b"data", struct.pack(">II", 1, 0), (text if isinstance(text, str) else json.dumps(text)).encode())
        for text in tags.values()
    ]
    if named:
        keys = box(b"keys", struct.pack(">II", 0, len(tags)), *(box(b"mdta", name.encode()) for name in tags))
        items = b"".join(box(struct.pack(">I", n), value) for n, value in enumerate(data, start=1))
    else:
        keys, items = b"", b"".join(box(name.encode("latin-1"), value) for name, value in zip(tags, data))
    moov = box(b"moov", box(b"mvhd", bytes(100)), box(b"udta", box(b"meta", bytes(4), hdlr, keys, box(b"ilst", items))))
    frames = struct.pack(">I4sQ", 1, b"mdat", 16 + 999) + bytes(999) if large else box(b"mdat", bytes(999))
    return box(b"ftyp", b"isom", bytes(4)) + frames + moov


def vint(number, length=8):
    return (number | 1 << 7 * length).to_bytes(length, "big")


def element(kind, content, size=None):
    return bytes.fromhex(kind) + (vint(len(content)) if size is None else size) + content


def matroska(**tags):
    simple = b"".join(
        element("67C8", element("45A3", name.encode()) + element("4487", json.dumps(text).encode()))
        for name, text in tags.items()
    )
    frames = element("1F43B675", bytes(500))
    segment = element("18538067", frames + element("1254C367", element("7373", element("63C0", b"") + simple)))
    return element("1A45DFA3", element("4282", b"webm")) + segment


CARRIERS = {
    "plain.json": lambda ui: json.dumps(ui).encode(),
    "mark.json": lambda ui: b"\xef\xbb\xbf" + json.dumps(ui).encode(),
    "a.png": lambda ui: png(workflow=ui, prompt={"9": {"class_type": "X", "inputs": {}}}),
    "zipped.png": lambda ui: png(compressed=True, workflow=ui),
    "a.webp": lambda ui: webp(prompt={"9": {"class_type": "X", "inputs": {}}}, workflow=ui),
    "a.mp4": lambda ui: mp4(prompt={"9": {"class_type": "X", "inputs": {}}}, workflow=ui),
    "large.mp4": lambda ui: mp4(large=True, workflow=ui),
    "comment.mp4": lambda ui: mp4(named=False, **{"©cmt": {"workflow": ui, "prompt": "{}"}}),
    "a.webm": lambda ui: matroska(PROMPT={"9": {"class_type": "X", "inputs": {}}}, WORKFLOW=ui),
    "comment.mkv": lambda ui: matroska(COMMENT={"workflow": ui}),
}


@pytest.mark.parametrize("name", CARRIERS)
def test_every_carrier_gives_back_its_workflow(name):
    assert read_carried(CARRIERS[name](UI), name) == UI
    assert read_carried(CARRIERS[name](UI), "named.wrong") == UI, "the bytes decide, not the name"


def test_the_api_form_is_read_where_it_is_all_there_is(workflow):
    for data in (
        json.dumps(workflow).encode(),
        json.dumps({"prompt": workflow, "client_id": "x"}).encode(),
        png(prompt=workflow),
        webp(prompt=workflow),
        mp4(prompt=workflow),
    ):
        assert read_carried(data, "x") == workflow


def test_subgraphs_make_the_api_form_the_better_one(workflow):
    subgraphs = {**UI, "definitions": {"subgraphs": [{"id": "a", "name": "b"}]}}
    assert read_carried(png(workflow=subgraphs, prompt=workflow), "x") == workflow
    assert read_carried(png(workflow=subgraphs), "x") == subgraphs, "a later reader says what is wrong with it"


def test_nan_that_comfyui_writes_becomes_null():
    text = '{"1": {"class_type": "X", "inputs": {"a": 1e999}, "is_changed": [NaN, -Infinity]}}'
    found = read_carried(png(prompt=text), "x")
    assert found == {"1": {"class_type": "X", "inputs": {"a": None}, "is_changed": [None, None]}}
    json.dumps(found, allow_nan=False)


def test_inputs_left_out_are_there_for_later_readers():
    assert read_carried(b'{"1": {"class_type": "X"}}', "x") == {"1": {"class_type": "X", "inputs": {}}}


def damaged_png():
    return png(workflow=UI)[:60]


def bomb(chunk):
    """A PNG whose text chunk unpacks to 128 MiB."""
    packer = zlib.compressobj(9)
    packed = b"".join([packer.compress(b" " * 2**20) for _ in range(128)]) + packer.flush()
    head = b"workflow\0\0" if chunk == b"zTXt" else b"workflow\0\1\0\0\0"
    body = chunk + head + packed
    data = png()
    return data[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + data[33:]


DEEP = "[" * 200_000
HOSTILE = {
    "empty": (lambda: b"  \n", "is empty"),
    "text": (lambda: b"hello", "is not JSON"),
    "binary": (lambda: bytes(range(128, 256)), "no picture or video that can carry"),
    "list": (lambda: b"[1]", "is not a ComfyUI workflow"),
    "number": (lambda: b"7", "is not a ComfyUI workflow"),
    "object": (lambda: b'{"a": 1}', "is not a ComfyUI workflow"),
    "no classes": (lambda: b'{"1": {"inputs": {}}}', "is not a ComfyUI workflow"),
    "inputs": (lambda: b'{"1": {"class_type": "X", "inputs": [1]}}', "inputs of node 1"),
    "deep": (lambda: DEEP.encode(), "nested too deep"),
    "deep object": (lambda: (b'{"a":' * 200_000), "nested too deep"),
    "deeper than readers can": (lambda: b'{"nodes": ' + b"[" * 500 + b"]" * 500 + b"}", "nested too deep"),
    "huge number": (lambda: b'{"nodes": [' + b"9" * 10_000 + b"]}", "is not JSON"),
    "half a character": (lambda: b'{"nodes": ["\\ud800"]}', "no Unicode"),
    "many values": (lambda: b'{"nodes": [' + b"0," * 500_001 + b"0]}", "more than 500,000 values"),
    "large": (lambda: b'{"nodes": ["' + b"x" * (33 * 2**20) + b'"]}', "more than 32 MiB"),
    "png of nothing": (lambda: png(), "without a workflow"),
    "png of text": (lambda: png(workflow="hello"), "The workflow in .* is not JSON"),
    "png of a list": (lambda: png(workflow="[]"), "is not a ComfyUI workflow"),
    "png of depth": (lambda: png(workflow=DEEP), "nested too deep"),
    "damaged png": (damaged_png, "damaged PNG"),
    "ztxt bomb": (lambda: bomb(b"zTXt"), "damaged PNG"),
    "itxt bomb": (lambda: bomb(b"iTXt"), "damaged PNG"),
    "webp of nothing": (lambda: webp(), "without a workflow"),
    "damaged webp": (lambda: webp(workflow=UI)[:40], "damaged WebP"),
    "jpeg": (lambda: b"\xff\xd8\xff\xe0", "without a workflow"),
    "mp4 of nothing": (lambda: mp4(), "without a workflow"),
    "mp4 with a box too large": (lambda: box(b"ftyp", b"isom") + b"\x7f\xff\xff\xffmoov", "damaged video"),
    "mp4 of endless boxes": (lambda: box(b"ftyp", b"isom") + box(b"free") * 30_000, "damaged video"),
    "mp4 of size 0": (lambda: box(b"ftyp", b"isom") + bytes(4) + b"moov" + bytes(9), "without a workflow"),
    "webm of nothing": (lambda: matroska(), "without a workflow"),
    "cut webm": (lambda: matroska(WORKFLOW=UI)[:-60], "is not JSON|without a workflow|damaged"),
    "webm of endless tags": (lambda: b"\x1aE\xdf\xa3\x80" + b"\x67\xc8\xff" * 300_000, "damaged video"),
    "webm of nonsense": (lambda: b"\x1aE\xdf\xa3" + bytes(50), "damaged video"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_give_one_sentence_in_bounded_time_and_memory(name):
    make, sentence = HOSTILE[name]
    data = make()
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(WorkflowError, match=sentence) as caught:
            read_carried(data, "photo.png")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "photo.png" in str(caught.value) or "photo.png" in sentence or "comment" in str(caught.value)
    assert peak < 300 * 2**20 and time.process_time() - began < 20
    assert "\n" not in str(caught.value)


def test_no_name_inside_a_file_is_opened(tmp_path, workflow):
    """Paths in a workflow stay text: reading it touches nothing."""
    target = tmp_path / "secret.json"
    workflow["1"]["inputs"]["unet_name"] = f"../../{target}"
    found = read_carried(png(prompt=workflow), str(tmp_path / "nowhere.png"))
    assert found == workflow and list(tmp_path.iterdir()) == []
    assert MOST_DEPTH < 100
