"""The command line: a table or JSON for results, one sentence and exit status 2 for mistakes."""

import json
import socket

import pytest


@pytest.fixture
def workflow_file(tmp_path, workflow):
    path = tmp_path / "image-taylor.json"
    path.write_text(json.dumps(workflow), encoding="utf-8")
    return path


@pytest.fixture
def compare(cli, fake, workflow_file, tmp_path):
    def go(*more):
        _, url = fake()
        return cli.main(
            [
                "compare",
                "--server",
                url,
                "--workflow",
                str(workflow_file),
                "--out",
                str(tmp_path / "out"),
                "--repeats",
                "1",
                "--reference-steps",
                "50",
                *more,
            ]
        )

    return go


def test_compare_prints_a_table_and_writes_the_report(compare, capsys, tmp_path):
    assert compare("--prompts", "a cat", "a dog") == 0
    text = capsys.readouterr().out
    assert "Taylor" in text and "16 + 12" in text and "PSNR to 50 steps" in text and "ceiling is 1.69×" in text
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["command"].startswith("python cli.py compare --server http://127.0.0.1:")
    assert (tmp_path / "out" / "index.html").exists()


def test_compare_prints_the_scores_of_clips(compare, video_workflow, tmp_path, capsys):
    (tmp_path / "image-taylor.json").write_text(json.dumps(video_workflow), encoding="utf-8")
    assert compare("--prompts", "a cat", "--batch", "2") == 0
    text = capsys.readouterr().out
    assert "PSNR of changes" in text and "in the worst frame" in text
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["settings"]["frames"] == 5


def test_compare_prints_json_alone(compare, capsys):
    assert compare("--json", "--batch", "2", "--seed", "3", "--steps", "12", "--no-fewer-steps") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["settings"]["batch"] == 2 and report["settings"]["seeds"] == [3] and report["settings"]["steps"] == 12
    assert "measuring" in captured.err


@pytest.mark.parametrize(
    "name,content,expected", [("p.txt", "one\n\n two \n", ["one", "two"]), ("p.json", '["one", "two"]', ["one", "two"])]
)
def test_prompts_from_files(compare, capsys, tmp_path, name, content, expected):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert compare("--json", "--prompts", str(tmp_path / name), "three", "--count", "2") == 0
    assert json.loads(capsys.readouterr().out)["settings"]["prompts"] == expected


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (["--prompts", "missing.json"], "cannot be read"),
        (["--workflow", "missing.json"], "cannot be read"),
        (["--resume", "--seed", "1", "--out", "{bad}"], "not a file of measurements"),
        (["--workflow", "{text}"], "is not JSON"),
        (["--workflow", "{list}"], "not a ComfyUI workflow"),
        (["--steps", "20000"], "KSampler (node 5), input 'steps'"),
    ],
)
def test_mistakes_give_one_sentence(compare, capsys, tmp_path, arguments, sentence):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "measurements.jsonl").write_text("x", encoding="utf-8")
    (tmp_path / "text").write_text("hello", encoding="utf-8")
    (tmp_path / "list").write_text("[1]", encoding="utf-8")
    places = {name: str(tmp_path / name) for name in ("bad", "text", "list")}
    assert compare(*(argument.format(**places) for argument in arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("stretto: ") and sentence in error


def test_no_server(cli, workflow_file, capsys):
    assert cli.main(["compare", "--server", "http://127.0.0.1:9", "--workflow", str(workflow_file)]) == 2
    assert "No ComfyUI server answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["compare"], ["compare", "--workflow", "x", "--repeats", "0"], ["panel", "--port", "70000"], ["nonsense"]],
)
def test_wrong_arguments_end_with_status_2(cli, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_panel_on_a_port_in_use(cli, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert cli.main(["panel", "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another with --port" in capsys.readouterr().err


def test_a_sweep_from_the_command_line(compare, capsys):
    assert compare("--json", "--each", "--sweep", "Cache.interval=2,3,4", "--sweep", "2.order=0", "--no-fewer-steps") == 0
    report = json.loads(capsys.readouterr().out)
    assert [arm["label"] for arm in report["arms"]] == [
        "Plain", "Taylor (every 2, order 1)", "Cache, interval 3", "Cache, interval 4", "Cache, order 0", "Plain, 50 steps",
    ]  # fmt: skip
    three, four = report["arms"][2:4]
    assert three["workflow"]["2"]["inputs"]["interval"] == 3 and four["ratio"]["sampler"]["median"] > 1.5


@pytest.mark.parametrize(
    "sweep,sentence",
    [
        ("interval", "is no sweep; write NODE.SETTING=value"),
        ("Other.interval=2", "No node is called 'Other'; Stretto nodes here: Cache (node 2)"),
        ("Cache.speed=2", "no setting 'speed'; it has method, interval, order"),
        ("Cache.interval=99", "whole numbers from 1 to 8"),
        ("Cache.interval=", "at least one value"),
    ],
)
def test_a_wrong_sweep_says_what_is_right(compare, capsys, sweep, sentence):
    assert compare("--sweep", sweep) == 2
    assert sentence in capsys.readouterr().err


def test_the_history_keeps_what_was_compared_and_what_failed(compare, capsys, tmp_path, workflow_file):
    from stretto.web.panel.measure.history import History

    file = tmp_path / "history.sqlite"
    assert compare("--history", str(file), "--prompts", "a red cat") == 0
    assert compare("--history", str(file), "--steps", "20000", "--out", str(tmp_path / "bad")) == 2
    failed, done = History(file).list()
    assert (done.state, done.workflow, failed.state) == ("finished", "image-taylor.json", "failed")
    assert "input 'steps'" in failed.summary and done.ratio > 1.5
    assert History(file).list(search="red cat") == [done]


def test_compare_prints_csv_alone(compare, capsys):
    assert compare("--csv", "--no-fewer-steps") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("created,label,role,verdict") and len(lines) == 4


def test_a_picture_carries_the_workflow(cli, fake, workflow, tmp_path, capsys):
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", json.dumps(workflow))
    Image.new("RGB", (8, 8)).save(tmp_path / "made.png", pnginfo=info)
    _, url = fake()
    words = ["compare", "--server", url, "--workflow", str(tmp_path / "made.png"), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--repeats", "1", "--reference-steps", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arms"][1]["verdict"] == "too few rounds for a verdict"
