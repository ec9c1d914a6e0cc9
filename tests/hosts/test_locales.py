"""English texts of the editor: those of the nodes agree with their schemas, and every word of the pages is there."""

import asyncio
import importlib.util
import json
import re
from pathlib import Path

import pytest

import stretto

ROOT = Path(__file__).resolve().parents[2]
ENGLISH = ROOT / "locales" / "en"
SCRIPTS = ROOT / "web" / "static"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("make_locales", ROOT / "scripts" / "make_locales.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_texts_of_nodes_are_those_of_the_schemas(generator):
    """Where this fails: .venv/bin/python scripts/make_locales.py"""
    nodes = asyncio.run(asyncio.run(stretto.comfy_entrypoint()).get_node_list())
    written = json.loads((ENGLISH / "nodeDefs.json").read_text(encoding="utf-8"))
    wanted = generator.node_definitions(nodes)
    assert sorted(written) == sorted(wanted), "run scripts/make_locales.py"
    for name, definition in wanted.items():
        assert written[name] == definition, f"{name}: run scripts/make_locales.py"


def test_every_word_of_the_pages_is_there_and_used():
    texts = json.loads((ENGLISH / "main.json").read_text(encoding="utf-8"))["stretto"]
    code = "\n".join(path.read_text(encoding="utf-8") for path in SCRIPTS.glob("*.js"))
    said = set(re.findall(r'\bsay\(\s*"([^"]+)"', code))
    assert said <= set(texts)
    for key in set(texts) - said:  # said by way of a value: a state, a decision, a status
        assert f'"{key}"' in code or re.search(rf"\b{re.escape(key)}:", code) or key.startswith("was-"), key


def test_settings_and_commands_have_their_words():
    code = (SCRIPTS / "sidebar.js").read_text(encoding="utf-8")
    for file in ("settings", "commands"):
        texts = json.loads((ENGLISH / f"{file}.json").read_text(encoding="utf-8"))
        block = code[code.index(f"  {file}: [") :]
        block = block[: block.index("\n  ],")]
        assert set(texts) == {name.replace(".", "_") for name in re.findall(r'\bid: "([^"]+)"', block)}, file
