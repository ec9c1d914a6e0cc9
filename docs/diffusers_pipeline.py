"""Any pipeline of diffusers, faster: clone this repository as ``stretto`` beside this script, and paste."""

import sys

import torch
from diffusers import DiffusionPipeline

from stretto import accelerate
from stretto.acceleration.plan import Request

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16, use_safetensors=True).to("cuda")
with accelerate(pipe, Request("cache", {"method": "Taylor", "interval": 3})) as run:
    pipe("a lighthouse in the rain", num_inference_steps=28).images[0].save("lighthouse.png")
print(run.trace["totals"], *(technique["reason"] for technique in run.trace["techniques"]))
