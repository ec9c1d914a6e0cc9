"""Profile, calibrate and a schedule of one's own on the trained demo model, through the server."""

import pytest

from .shipped import key_of

STEPS = 10


@pytest.fixture
def prompt(api):
    """The plain workflow with Profile and Calibrate beside its sampler."""
    prompt = api("plain")
    sampler = prompt[key_of(prompt, "KSampler")]["inputs"]
    sampler["steps"] = STEPS
    inputs = {name: value for name, value in sampler.items() if name != "control_after_generate"}
    prompt["profile"] = {"class_type": "StrettoProfile", "inputs": inputs}
    calibrate = {
        "profile": ["profile", 0], "target": "PSNR at least (dB)", "value": 20.0, "forecaster": "line",
        "extra_seeds": 0, "probes": 2, "name": "from the server", "vae": prompt[key_of(prompt, "VAEDecode")]["inputs"]["vae"],
    }  # fmt: skip
    prompt["calibrate"] = {"class_type": "StrettoCalibrate", "inputs": calibrate}
    return prompt


def test_profile_and_calibrate_run_and_show_their_pictures(comfy, prompt):
    run = comfy.run(prompt)
    assert f"euler, {STEPS} steps" in run.outputs["profile"]["text"][0]
    assert "Target: PSNR at least 20" in run.outputs["calibrate"]["text"][0]
    for node in ("profile", "calibrate"):
        assert comfy.pixels(run, node).shape[1:] == (960, 3)
    assert all("records" not in trace for trace in comfy.traces(run))


def test_a_target_out_of_reach_is_an_error_in_words(comfy, prompt):
    prompt["calibrate"]["inputs"].update(value=99.0, name="")
    run = comfy.attempt(prompt)
    assert "no mask keeps 99 dB: the best is" in run.error["exception_message"]


def test_a_schedule_is_what_the_report_shows(comfy, prompt):
    del prompt["profile"], prompt["calibrate"]
    sampler = prompt[key_of(prompt, "KSampler")]["inputs"]
    schedule = {"model": sampler["model"], "schedule": "####.##.##", "forecaster": "line", "required": True}
    prompt["schedule"] = {"class_type": "StrettoCacheSchedule", "inputs": schedule}
    sampler["model"] = ["schedule", 0]
    trace = comfy.traces(comfy.run(prompt))[0]
    assert "".join("#" if entry["decision"] == "computed" else "." for entry in trace["evaluations"]) == "####.##.##"
