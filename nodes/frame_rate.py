"""Dynamic frame rate: schedules, VAEs that follow them, and sampling on fewer latent frames."""

import json

import comfy.samplers
from comfy_api.latest import io, ui

from ..acceleration.errors import StrettoError
from ..acceleration.frame_rate.fitting import fit_ratio, fit_threshold
from ..acceleration.frame_rate.restoration import from_interpolated, restore_frames
from ..acceleration.frame_rate.schedule import (
    CODINGS,
    LINEAR,
    PIXELS,
    RATES,
    RESTORES,
    FrameRateSchedule,
    full_latents,
    schedule_of_latent,
    with_schedule,
)
from ..acceleration.frame_rate.similarity import loss_of
from ..acceleration.frame_rate.technique import parse_layers
from ..acceleration.hosts.comfy_frame_rate import (
    DynamicSettings,
    GatheredNoise,
    prepare_second_pass,
    sample_dynamic,
)
from ..acceleration.hosts.comfy_frame_rate_probe import probe_layers
from ..acceleration.hosts.comfy_sampling import SamplingJob
from ..acceleration.hosts.comfy_video_vae import DynamicRateVAE, stride_of
from .frame_strip import draw_schedule
from .inputs import ADVANCED

ScheduleType = io.Custom("STRETTO_FRAME_SCHEDULE")
RATIO, THRESHOLD, BY_HAND = "target share", "thresholds", "by hand"
MODES = {
    RATIO: "keep this percent of the latent frames, the calmest parts give theirs first",
    THRESHOLD: "slow down wherever a frame would lose no more than the two numbers",
    BY_HAND: "the rates that you write down",
}


class StrettoFrameSchedule(io.ComfyNode):
    """Decide where a video needs its frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoFrameSchedule",
            display_name="Stretto Frame Schedule",
            category="Stretto",
            description="Looks at a video and decides how many latent frames each part of it needs: calm parts get fewer.",
            inputs=[  # saved values are positional: append only
                io.Image.Input("images", tooltip="The frames of the video, in order."),
                io.Vae.Input("vae", tooltip="The video VAE that will encode it: it says how many frames a latent frame has."),
                io.Combo.Input("mode", options=list(MODES), default=RATIO, tooltip=_listed(MODES)),
                _keep(),
                io.Float.Input("half", default=0.02, min=0.0, max=1.0, step=0.005, round=0.0001,
                               tooltip="The most that a frame may lose at half the rate, as 1 - SSIM. (thresholds)"),
                io.Float.Input("quarter", default=0.01, min=0.0, max=1.0, step=0.005, round=0.0001,
                               tooltip="The most that a frame may lose at a quarter of the rate. (thresholds)"),
                io.String.Input("rates", default="", multiline=True,
                                tooltip="1, 2 or 4 for each latent frame after the first, in order, such as 1 1 2 4; or a "
                                "saved schedule as JSON. (by hand)"),
                io.Combo.Input("coding", options=list(CODINGS), default=PIXELS, optional=True,
                               tooltip=_listed(CODINGS), **ADVANCED),
                _restore(),
                io.Combo.Input("slowest", options=["1/4", "1/2"], default="1/4", optional=True,
                               tooltip="The slowest rate that a part may get.", **ADVANCED),
            ],
            outputs=[
                ScheduleType.Output(display_name="schedule"),
                io.Image.Output(display_name="preview"),
                io.String.Output(display_name="json"),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, images, vae, mode, keep, half, quarter, rates, coding=PIXELS, restore=LINEAR, slowest="1/4"
    ) -> io.NodeOutput:
        stride, options = stride_of(vae), {"coding": coding, "restore": restore}
        if mode == BY_HAND:
            schedule, changes = _by_hand(rates, len(images), stride, options), None
        else:
            loss = loss_of(images, stride)
            allowed = [rate for rate in RATES if rate <= int(slowest[-1])]
            if mode == RATIO:
                fitted = fit_ratio(loss, keep / 100.0, rates=allowed)
            else:
                fitted = fit_threshold(loss, half, quarter, rates=allowed)
            schedule, changes = FrameRateSchedule(len(images), fitted, stride, **options), loss.change
        picture = draw_schedule(schedule, images, changes)
        text = json.dumps(schedule.to_json())
        return io.NodeOutput(schedule, picture, text, ui=ui.PreviewImage(picture, cls=cls))


class StrettoDynamicVAEEncode(io.ComfyNode):
    """Encode a video with fewer latent frames where it is calm."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoDynamicVAEEncode",
            display_name="Stretto Dynamic VAE Encode",
            category="Stretto",
            description="Encodes a video at the rates of a frame schedule. The latent carries the schedule; decode it with "
            "Stretto Dynamic VAE Decode.",
            inputs=[
                io.Image.Input("images", tooltip="The frames of the video that the schedule was made for."),
                io.Vae.Input("vae", tooltip="A video VAE."),
                ScheduleType.Input("schedule", tooltip="From Stretto Frame Schedule."),
                _tile(),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, images, vae, schedule, tile: int = 0) -> io.NodeOutput:
        dynamic = DynamicRateVAE(vae, schedule)
        pixels = images[..., :3]
        samples = dynamic.encode_tiled(pixels, tile_x=tile, tile_y=tile) if tile else dynamic.encode(pixels)
        return io.NodeOutput(with_schedule({"samples": samples}, schedule))


class StrettoDynamicVAEDecode(io.ComfyNode):
    """Decode a video of changing frame rate to all of its frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoDynamicVAEDecode",
            display_name="Stretto Dynamic VAE Decode",
            category="Stretto",
            description="Decodes a latent that carries a frame schedule, and makes up the frames in between: always as many "
            "as the video had. A latent without a schedule is decoded as ever.",
            inputs=[
                io.Latent.Input("samples", tooltip="From Stretto Dynamic VAE Encode or Stretto Dynamic Frame Rate."),
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                io.Combo.Input("restore", options=["as scheduled", *RESTORES, "none"], default="as scheduled",
                               tooltip=f"How frames in between are made. {_listed(RESTORES)}; none: leave them out, for an "
                               "interpolator of your own and Stretto Restore Frames."),
                _tile(),
            ],
            outputs=[io.Image.Output(display_name="images"), ScheduleType.Output(display_name="schedule")],
        )  # fmt: skip

    @classmethod
    def execute(cls, samples, vae, restore: str, tile: int = 0) -> io.NodeOutput:
        schedule, latents = schedule_of_latent(samples), samples["samples"]
        if schedule is None:
            if latents.ndim != 5:
                raise StrettoError(f"Stretto Dynamic VAE Decode: the latent is no video: {tuple(latents.shape)}")
            schedule = FrameRateSchedule.full(1 + stride_of(vae) * (latents.shape[2] - 1), stride_of(vae))
        used = schedule
        if restore == "none":
            if schedule.coding != PIXELS:
                raise StrettoError("Stretto Dynamic VAE Decode: restore 'none' needs a schedule of the coding 'frames'")
            used = FrameRateSchedule.full(schedule.short_frames, schedule.stride)
        elif restore in RESTORES:
            used = schedule.with_options(restore=restore)
        dynamic = DynamicRateVAE(vae, used)
        side = max(tile // vae.spacial_compression_decode(), 1)
        if tile:
            videos = dynamic.decode_tiled(latents, tile_x=side, tile_y=side, overlap=max(side // 4, 1))
        else:
            videos = dynamic.decode(latents)
        return io.NodeOutput(videos.flatten(0, 1), schedule)


class StrettoRestoreFrames(io.ComfyNode):
    """Make up the frames that a schedule has left out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoRestoreFrames",
            display_name="Stretto Restore Frames",
            category="Stretto",
            description="Brings decoded frames back to the video's full number of frames, by itself or from frames that "
            "another interpolation node has multiplied.",
            inputs=[
                io.Image.Input("images", tooltip="Decoded frames, from Stretto Dynamic VAE Decode with restore none; or the "
                               "same after an interpolator that multiplies them by 2 or 4."),
                ScheduleType.Input("schedule", tooltip="The schedule of these frames."),
                io.Combo.Input("method", options=[*RESTORES, "multiplied"], default=LINEAR,
                               tooltip=f"{_listed(RESTORES)}; multiplied: the images come from an interpolator, pick from them."),
            ],
            outputs=[io.Image.Output(display_name="images")],
        )  # fmt: skip

    @classmethod
    def execute(cls, images, schedule, method: str) -> io.NodeOutput:
        if method == "multiplied":
            return io.NodeOutput(from_interpolated(images, schedule))
        return io.NodeOutput(restore_frames(images, schedule, method))


class StrettoDynamicFrameRate(io.ComfyNode):
    """KSampler that drops latent frames where the video turns out calm."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoDynamicFrameRate",
            display_name="Stretto Dynamic Frame Rate",
            category="Stretto",
            description="In the place of KSampler for video (VGDFR): samples the first steps at full length, looks at the video "
            "that is coming, and finishes on fewer latent frames. Decode with Stretto Dynamic VAE Decode.",
            inputs=[  # saved values are positional: append only
                io.Model.Input("model", tooltip="A video model; may carry other Stretto nodes."),
                io.Vae.Input("vae", tooltip="The VAE of the model: mid-run the video is decoded and encoded once."),
                io.Conditioning.Input("positive", tooltip="What the video shall show."),
                io.Conditioning.Input("negative", tooltip="What it shall not show."),
                io.Latent.Input("latent_image", tooltip="An empty video latent, or one to start from; one video."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                             tooltip="Of the noise, which is made at full length."),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Steps of the whole run."),
                io.Float.Input("cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="Guidance scale, as in KSampler."),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="euler",
                               tooltip="euler serves best; samplers that use earlier steps begin anew on the short video."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="simple",
                               tooltip="Noise levels, as in KSampler."),
                io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01,
                               tooltip="Share of the noise levels that is run, as in KSampler."),
                _keep(),
                _after(),
                _restore(),
                _layers(),
                _fresh(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent"),
                ScheduleType.Output(display_name="schedule"),
                io.String.Output(display_name="report"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, vae, positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, denoise, keep,
        after, restore=LINEAR, layers="auto", fresh=False,
    ) -> io.NodeOutput:  # fmt: skip
        settings = DynamicSettings(keep / 100.0, after / 100.0, parse_layers(layers), restore, fresh)
        job = SamplingJob(model, positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, denoise)
        latent, seconds = sample_dynamic(job, vae, settings)
        schedule = schedule_of_latent(latent)
        return io.NodeOutput(latent, schedule, report_words(schedule, seconds))


class StrettoFrameRateSecondPass(io.ComfyNode):
    """The middle of a dynamic run, for graphs of custom samplers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoFrameRateSecondPass",
            display_name="Stretto Frame Rate Second Pass",
            category="Stretto",
            description="Stands between two custom samplers (Split Sigmas): takes the first one's denoised_output and hands "
            "everything shortened to the second: model, conditioning, noise and latent.",
            inputs=[
                io.Model.Input("model", tooltip="The model of the first sampler."),
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                io.Conditioning.Input("positive", tooltip="What the video shall show."),
                io.Conditioning.Input("negative", tooltip="What it shall not show."),
                io.Noise.Input("noise", tooltip="The noise of the first sampler: the second gets its rows."),
                io.Latent.Input("denoised", tooltip="denoised_output of the first sampler."),
                _keep(),
                _restore(),
                _layers(),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Noise.Output(display_name="noise"),
                io.Latent.Output(display_name="latent"),
                ScheduleType.Output(display_name="schedule"),
                io.String.Output(display_name="report"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, vae, positive, negative, noise, denoised, keep, restore=LINEAR, layers="auto"
    ) -> io.NodeOutput:
        settings = DynamicSettings(keep / 100.0, layers=parse_layers(layers), restore=restore, fresh=True)
        found = prepare_second_pass(model, vae, positive, negative, denoised, settings)
        gathered = GatheredNoise(noise, found.schedule)
        words = report_words(found.schedule, found.seconds)
        return io.NodeOutput(
            found.model, found.positive, found.negative, gathered, found.latent, found.schedule, words
        )


class StrettoFrameRateProbe(io.ComfyNode):
    """Ask a model which of its layers look at the whole video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoFrameRateProbe",
            display_name="Stretto Frame Rate Probe",
            category="Stretto",
            description="Finds the layers that should see a shortened video's original positions, for the input layers of "
            "Stretto Dynamic Frame Rate. One plain run and a few evaluations per layer.",
            inputs=[
                io.Model.Input("model", tooltip="A video model whose blocks can be reached: Wan, HunyuanVideo."),
                io.Conditioning.Input("positive", tooltip="A typical prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Latent.Input("latent_image", tooltip="An empty video latent of at least 17 frames, or an encoded video."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip="Of the noise."),
                io.Int.Input("steps", default=20, min=2, max=1000, tooltip="Steps of the plain run."),
                io.Float.Input("cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance scale."),
            ],
            outputs=[io.String.Output(display_name="layers"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent_image, seed, steps, cfg) -> io.NodeOutput:
        job = SamplingJob(model, positive, negative, latent_image, seed, steps, cfg, "euler", "simple")
        layers, helps = probe_layers(job)
        lines = [f"layer {i}: {value:+.1%}" for i, value in enumerate(helps)]
        return io.NodeOutput(", ".join(map(str, layers)) or "none", "\n".join(lines))


def report_words(schedule: FrameRateSchedule, seconds: dict[str, float]) -> str:
    """Return what was kept and what each part of the run took, in words."""
    names = {"first": "steps at full length", "second": "steps on the short video", "decode": "decoding in between",
             "choose": "choosing", "encode": "encoding in between"}  # fmt: skip
    parts = [f"{names[name]} {value:.2f} s" for name, value in seconds.items()]
    return "; ".join([schedule.words(), *parts])


def _by_hand(text: str, frames: int, stride: int, options: dict) -> FrameRateSchedule:
    if text.strip().startswith("{"):
        try:
            return FrameRateSchedule.from_json(json.loads(text))
        except json.JSONDecodeError as error:
            raise StrettoError(f"Stretto Frame Schedule: rates is no JSON: {error}") from None
    try:
        rates = tuple(int(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise StrettoError(f"Stretto Frame Schedule: rates is {text!r}; it must be numbers such as 1 1 2 4") from None
    return FrameRateSchedule(frames, rates or (1,) * (full_latents(frames, stride) - 1), stride, **options)


def _listed(table: dict[str, str]) -> str:
    return "; ".join(f"{name}: {words}" for name, words in table.items())


def _keep() -> io.Input:
    return io.Float.Input("keep", default=60.0, min=10.0, max=100.0, step=1.0, round=0.1,
                          tooltip="Keep: percent of the latent frames. 60 is a good start, 100 keeps all.")  # fmt: skip


def _after() -> io.Input:
    return io.Float.Input("after", default=20.0, min=0.0, max=90.0, step=1.0, round=0.1,
                          tooltip="Start after: percent of the steps that run at full length first.")  # fmt: skip


def _restore() -> io.Input:
    return io.Combo.Input("restore", options=list(RESTORES), default=LINEAR, optional=True,
                          tooltip=f"How decoding makes the frames in between. {_listed(RESTORES)}.", **ADVANCED)  # fmt: skip


def _layers() -> io.Input:
    return io.String.Input("layers", default="auto", optional=True,
                           tooltip="Layers that see the latents' original places in time: auto, none, or numbers such as 1, 4.",
                           **ADVANCED)  # fmt: skip


def _fresh() -> io.Input:
    return io.Boolean.Input("fresh", default=False, optional=True,
                            tooltip="As published: start all latents anew from encoded frames and the seed's noise. Off: those "
                            "whose rate does not change go on from where they are.", **ADVANCED)  # fmt: skip


def _tile() -> io.Input:
    return io.Int.Input("tile", default=0, min=0, max=4096, step=64, optional=True,
                        tooltip="Side of tiles in pixels, 0 for none. Only space is cut; time never is.", **ADVANCED)  # fmt: skip
