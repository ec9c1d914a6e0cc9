"""The report of a run on fewer latent frames: what was kept, in words and as a picture."""

import json

import jsonschema
import numpy as np
import pytest
import torch

from stretto.acceleration.errors import StrettoError
from stretto.acceleration.frame_rate.schedule import FrameRateSchedule
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.hosts.comfy_frame_rate import DynamicSettings, sample_dynamic
from stretto.acceleration.plan import Request
from stretto.acceleration.schemas import schema
from stretto.acceleration.summary import summary
from stretto.nodes.frame_rate_map import COLOURS, TOP, frame_rate_map

from .test_frame_rate import SCHEDULE, calm_vae, job, vae  # noqa: F401  (fixtures)
from .tiny_models import sample


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def trace_of(tiny, vae, **settings):  # noqa: F811
    latent, seconds = sample_dynamic(job(tiny), vae, DynamicSettings(0.5, **settings))
    return json.loads(json.dumps(host.TRACES.of_prompt(None)[-1])), FrameRateSchedule.from_json(
        latent["frame_rate_schedule"]
    ), seconds  # fmt: skip


def cells(picture, schedule):
    """The colour inside each latent's cell, as hex."""
    from stretto.nodes.timeline import LABEL, MARGIN, WIDTH

    width = (WIDTH - 2 * MARGIN - LABEL) / schedule.full_latents
    at = [(int(MARGIN + LABEL + (i + 0.5) * width), TOP + 18) for i in range(schedule.full_latents)]
    return ["#{:02X}{:02X}{:02X}".format(*picture.getpixel(place)) for place in at]


def test_words_and_picture_tell_what_was_kept(tiny, calm_vae):  # noqa: F811
    trace, schedule, seconds = trace_of(tiny, calm_vae, layers=[0, 2])
    jsonschema.validate(trace, schema("trace"))
    assert set(trace["frame_rate"]["seconds"]) == {"decode", "choose", "encode"}
    text = summary(trace)
    assert f"{schedule.latents} of 9 latent frames, {schedule.ratio:.0%} of the tokens" in text
    assert "layers 0, 2 saw their original places in time." in text
    told = f"decoding {seconds['decode']:.2f} s, choosing frames {seconds['choose']:.2f} s"
    assert f"{told}, encoding {seconds['encode']:.2f} s." in text
    found = cells(frame_rate_map(trace), schedule)
    rates = dict(zip(schedule.kept, (1, *schedule.rates), strict=True))
    assert max(rates.values()) > 1
    for place, colour in enumerate(found):
        assert (colour in COLOURS.values()) == (place in rates), f"latent {place}"
        assert place not in rates or colour == COLOURS[rates[place]]


def test_layers_that_see_neighbours_and_unknown_seconds_are_told_too(tiny):
    wanted = {"schedule": SCHEDULE.to_json(), "layers": []}
    model = host.request(tiny("wan"), Request("frame_rate", wanted))
    sample(model, "wan", shape=(16, 5, 4, 4))
    trace = host.TRACES.of_prompt(None)[-1]
    text = summary(trace)
    assert "56% of the tokens; every layer saw them as neighbours." in text and "Before these steps" not in text
    with_seconds = trace | {"frame_rate": trace["frame_rate"] | {"seconds": {"decode": 1.0}}}
    assert frame_rate_map(trace).height < frame_rate_map(with_seconds).height


def test_a_table_that_somebody_changed_is_told(tiny, calm_vae):  # noqa: F811
    trace, _, _ = trace_of(tiny, calm_vae, layers=[0])
    trace["frame_rate"]["positions_refused"] = True
    assert "original places were not given to any layer" in summary(trace)


def test_runs_of_full_length_have_no_such_picture(tiny):
    sample(host.request(tiny("wan"), Request("measure")), "wan")
    trace = host.TRACES.of_prompt(None)[-1]
    assert frame_rate_map(trace) is None and "Frame rate" not in summary(trace)


@pytest.mark.parametrize("count", [1, 5, 6_000])
def test_videos_of_any_length_can_be_drawn(count):
    schedule = FrameRateSchedule(1 + 16 * count, (4,) * count)
    section = {"schedule": schedule.to_json(), "global_layers": [], "positions_refused": False, "seconds": {}}
    picture = np.asarray(frame_rate_map({"frame_rate": section}))
    assert picture.shape[1] == 960 and picture.std() > 0


def test_unknown_settings_are_still_refused(tiny):
    with pytest.raises(StrettoError, match="unknown setting 'speed'"):
        host.request(tiny("wan"), Request("frame_rate", {"schedule": SCHEDULE.to_json(), "speed": 1}))
