"""Where each public name of this package is: for type checkers, and for `__init__.py`, which imports it when asked."""

from ldm.conditioning.cond import Cond as Cond
from ldm.config import FAMILIES as FAMILIES
from ldm.config import ModelConfig as ModelConfig
from ldm.config import ScheduleConfig as ScheduleConfig
from ldm.config import TextConfig as TextConfig
from ldm.config import UNetConfig as UNetConfig
from ldm.config import VAEConfig as VAEConfig
from ldm.config import VisionConfig as VisionConfig
from ldm.denoiser import guided as guided
from ldm.denoiser import predict_x0 as predict_x0
from ldm.model import LatentDiffusion as LatentDiffusion
