"""Sound goes past the nodes that take frames: a video keeps it, its frame rate and its length."""

import math

import comfy_extras.nodes_video as core
import pytest
import torch
from comfy_api.latest import InputImpl

from stretto.nodes.frame_rate import (
    StrettoDynamicVAEDecode,
    StrettoDynamicVAEEncode,
    StrettoFrameSchedule,
    StrettoRestoreFrames,
)

from .test_nodes import nodes  # noqa: F401  (a fixture)
from .test_video_vae import wan as wan_vae

FRAMES, FPS, SAMPLE_RATE = 33, 8.0, 32000


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A film of 33 frames with a tone, from a file as Load Video gives it; still, then wild."""
    generator = torch.Generator().manual_seed(1)
    frames = torch.rand(1, 32, 32, 3, generator=generator).expand(FRAMES, -1, -1, -1).clone()
    frames[24:] = torch.rand(9, 32, 32, 3, generator=generator)
    time = torch.arange(int(SAMPLE_RATE * FRAMES / FPS)) / SAMPLE_RATE
    tone = torch.stack([torch.sin(2 * math.pi * hertz * time) for hertz in (440, 660)])[None] / 2
    video = core.CreateVideo.execute(frames, FPS, {"waveform": tone, "sample_rate": SAMPLE_RATE}).result[0]
    return as_file(video, tmp_path_factory.mktemp("film") / "recorded.mp4")


def as_file(video, path):
    video.save_to(str(path))
    return InputImpl.VideoFromFile(str(path))


def through(images, vae, restore):
    """The round trip of the help pages: schedule, encode, decode."""
    schedule, _, _ = StrettoFrameSchedule.execute(images, vae, "target share", 60.0, 0.02, 0.01, "").result
    (latent,) = StrettoDynamicVAEEncode.execute(images, vae, schedule).result
    assert latent["samples"].shape[2] < 9, "frames are missing in between"
    back, schedule = StrettoDynamicVAEDecode.execute(latent, vae, restore).result
    return StrettoRestoreFrames.execute(back, schedule, "motion").result[0] if restore == "none" else back


@pytest.mark.parametrize("restore", ["as scheduled", "none"])
def test_a_video_comes_back_with_its_sound_rate_and_length(recorded, tmp_path, monkeypatch, restore):
    monkeypatch.setattr(StrettoFrameSchedule, "hidden", None, raising=False)
    monkeypatch.setattr("stretto.nodes.frame_rate.ui.PreviewImage", lambda *_, **__: None)
    with torch.inference_mode():
        images, sound, fps = core.GetVideoComponents.execute(recorded).result
        made = core.CreateVideo.execute(through(images, wan_vae(), restore), fps, sound).result[0]
        after, kept, rate = core.GetVideoComponents.execute(made).result
    assert len(images) == len(after) == FRAMES and rate == fps == FPS
    assert kept["sample_rate"] == sound["sample_rate"] == SAMPLE_RATE
    assert torch.equal(kept["waveform"], sound["waveform"]) and sound["waveform"].abs().max() > 0.3
    assert as_file(made, tmp_path / "made.mp4").get_duration() == pytest.approx(recorded.get_duration(), abs=0.05)


def test_no_node_takes_or_gives_sound_or_videos(nodes):  # noqa: F811
    """What is never handed over cannot be cut or stretched: films are taken apart and put together by ComfyUI's nodes."""
    for name, node in nodes.items():
        schema = node.define_schema()
        kinds = {item.get_io_type() for item in (*schema.inputs, *schema.outputs)}
        assert not kinds & {"AUDIO", "VIDEO"}, name
