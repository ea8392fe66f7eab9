"""What models are for, each task a function from a model and what it starts from to pictures."""

from ldm.tasks.hires import hires
from ldm.tasks.image import depth2img, img2img, variations
from ldm.tasks.inpaint import inpaint, outpaint
from ldm.tasks.interpolate import interpolate
from ldm.tasks.text import txt2img
from ldm.tasks.upscale import upscale

__all__ = ["depth2img", "hires", "img2img", "inpaint", "interpolate", "outpaint", "txt2img", "upscale", "variations"]
