"""The command line: what its commands are, and which file of this folder has each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One word of the command line. Its module has a function NAME that runs it, and add_NAME that adds its options."""

    help: str  # what 'ldm --help' says of it
    module: str  # the file of this folder
    examples: str  # for its own --help
    usage: str | None = None  # of a command that makes pictures, whose options are in `ldm.cli.options`


COMMANDS: dict[str, Command] = {
    "txt2img": Command("draw what a prompt says", "text", """
  ldm txt2img "a red cube on top of a blue sphere"
  ldm txt2img "a green cone behind a yellow cylinder" --n 9 --seed 7 --sheet
  ldm txt2img "a lighthouse in a storm" --ckpt v1-5-pruned-emaonly.safetensors --steps 30 --out lighthouse.png
  ldm txt2img "a lighthouse, (storm:1.3)" --ckpt v1-5-pruned-emaonly.safetensors --lora engraving.safetensors:0.8\
 --hires 2x
  ldm txt2img "a lighthouse" --ckpt sd_xl_base_1.0.safetensors --refiner sd_xl_refiner_1.0.safetensors --refine-from 0.8
  ldm txt2img "a red cube" --seed 7 --grid-of cfg=1.5,2,3,4,5,6,7,8 --grid-of sampler=ddim,plms""",
        "PROMPT [options]"),
    "img2img": Command("redraw a picture as a prompt says", "image", """
  ldm img2img "a purple cone on top of a blue sphere" --init outputs/00001.png --strength 0.7
  ldm img2img "an oil painting of a harbour" --init photo.jpg --width 512 --ckpt v1-5-pruned-emaonly.safetensors""",
        "PROMPT --init IMAGE [options]"),
    "inpaint": Command("paint a part of a picture anew", "image", """
  ldm inpaint "a red cube on top of a blue sphere" --init outputs/00001.png --mask mask.png --feather 4
  ldm inpaint "a cat on a bench" --init bench.png --mask-from alpha --ckpt sd-v1-5-inpainting.ckpt""",
        "PROMPT --init IMAGE (--mask IMAGE | --mask-from alpha) [options]"),
    "outpaint": Command("go on beyond the borders of a picture", "image", """
  ldm outpaint "a red cube on top of a blue sphere" --init outputs/00001.png --extend left=32 --extend right=32
  ldm outpaint "a wide beach" --init beach.jpg --extend right=256 --feather 16 --ckpt 512-inpainting-ema.safetensors""",
        "PROMPT --init IMAGE --extend SIDE=PIXELS [options]"),
    "depth2img": Command("draw other things in the shapes of a picture (needs a depth model)", "image", """
  ldm depth2img "a robot in a workshop" --init portrait.jpg --strength 0.9 --ckpt 512-depth-ema.safetensors
  ldm depth2img "a marble hall" --init hall.png --depth hall-depth.png --ckpt 512-depth-ema.safetensors""",
        "PROMPT --init IMAGE [options]"),
    "upscale": Command("make a picture four times as wide and high (needs an x4 upscaler)", "image", """
  ldm upscale "a white cat" --init small.png --noise-level 20 --ckpt x4-upscaler-ema.safetensors
  ldm upscale "" --init large.jpg --window 128 --ckpt x4-upscaler-ema.safetensors""",
        "PROMPT --init IMAGE [options]"),
    "variations": Command("draw pictures like another one (needs an Image Variations model)", "image", """
  ldm variations --init painting.jpg --n 4 --sheet --ckpt sd-clip-vit-l14-img-embed_ema_only.ckpt""",
        "--init IMAGE [options]"),
    "hires": Command("draw a large picture: draw it small, enlarge it, redraw it", "text", """
  ldm hires "a red cube on top of a blue sphere" --scale 2x
  ldm hires "a lighthouse in a storm" --scale 1.5x --enlarge latent --strength 0.7\
 --ckpt v1-5-pruned-emaonly.safetensors""",
        "PROMPT [options]"),
    "interpolate": Command("go from prompt to prompt, or seed to seed", "animating", """
  ldm interpolate "a red cube" "a blue sphere" --frames 24 --fps 12
  ldm interpolate "a red cube on top of a blue sphere" --seeds 1,2,3 --animation gif""",
        "PROMPT [PROMPT ...] [--seeds 1,2,...] [options]"),
    "inspect": Command("say what files of weights are", "inspecting", """
  ldm inspect v1-5-pruned-emaonly.safetensors
  ldm inspect --hash v1-5-pruned-emaonly.safetensors
  ldm inspect *.safetensors --json
  ldm inspect engraving.safetensors --keys '*attn2*'"""),
    "diff": Command("compare two files of weights", "differing", """
  ldm diff v1-5-pruned-emaonly.ckpt v1-5-pruned-emaonly.safetensors
  ldm diff v1-5-pruned-emaonly.safetensors dreamshaper_8.safetensors --quick
  ldm diff v1-5-pruned-emaonly.safetensors mix.safetensors --third dreamshaper_8.safetensors"""),
    "convert": Command("write weights in another container, layout or type of numbers", "converting", """
  ldm convert v1-5-pruned.ckpt v1-5.safetensors
  ldm convert sd_xl_base_1.0.safetensors sdxl/ --dtype fp16 --shard-size 2GB
  ldm convert my-finetune/ my-finetune.safetensors --manifest where-it-went.json
  ldm convert v1-5-pruned.ckpt v1-5-ema-fp16.safetensors --ema --prune --dtype fp16
  ldm convert 768-v-ema.ckpt vae.safetensors --only vae"""),
    "merge": Command("merge two or three models into one", "converting", """
  ldm merge a.safetensors b.safetensors --out ab.safetensors --alpha 0.3
  ldm merge a.ckpt b.safetensors --out ab.safetensors --blocks IN00=0.2,MID=0.5,OUT11=0.9,TEXT=0,VAE=0 --dtype fp16
  ldm merge sd-v1-5-inpainting.ckpt style.safetensors v1-5-pruned.ckpt --out style-inpainting.safetensors\
 --method add-difference --alpha 1"""),
    "lora": Command("extract, merge, resize or convert LoRA files", "lora", """
  ldm lora extract v1-5-pruned-emaonly.safetensors tuned.safetensors --variance 0.95 --max-rank 64\
 --out tuned-lora.safetensors
  ldm lora merge v1-5-pruned-emaonly.safetensors engraving.safetensors:0.8 lines.safetensors --out engraved.safetensors
  ldm lora resize engraving.safetensors --rank 8 --out small.safetensors
  ldm lora convert engraving.safetensors --to diffusers --out pytorch_lora_weights.safetensors"""),
    "repair": Command("repair a damaged file of weights", "converting", """
  ldm repair merged.safetensors
  ldm repair old.ckpt --dry-run
  ldm repair old.ckpt --out sound.safetensors"""),
    "prune": Command("take blocks out of a model: a smaller one, to be trained by distillation", "converting", """
  ldm prune sd_xl_base_1.0.safetensors student.safetensors --plan ssd-1b
  ldm prune v1-5-pruned.safetensors small.safetensors --plan half --dtype fp32"""),
    "train": Command("train a model, a LoRA, a new word or an autoencoder", "training", """
  ldm train
  ldm train sygil --show
  ldm train sygil --set data.path=photos --set model.start=v1-5-pruned.safetensors --out runs/photos
  ldm train my-lora.toml --set optimizer.lr=2e-4"""),
    "samplers": Command("list the samplers and their grids of noise levels", "listing", """
  ldm samplers --steps 10"""),
}  # fmt: skip
