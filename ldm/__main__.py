"""The command line, `ldm` or `python -m ldm`: arguments in, pictures and exit codes out."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import weights
from ldm.cli import arguments, commands, converting, differing, inspecting, lora, making, options, terminal, training
from ldm.cli.arguments import Command
from ldm.cli.files import Readers
from weights.adapters.embedding import load_embedding
from weights.adapters.read import load_lora
from weights.models import embedded


def _pictures(plan: making.Plan) -> Callable[[argparse.Namespace, Readers], None]:
    """What runs a command that makes pictures as `plan` says."""

    def run(args: argparse.Namespace, readers: Readers) -> None:
        making.make(args, plan, readers)

    run.__doc__ = plan.__doc__
    return run


# One entry is one subcommand: what 'ldm --help' says of it, its options, what runs it, examples for its own --help.
COMMANDS: dict[str, Command] = {
    "txt2img": Command("draw what a prompt says", options.txt2img, _pictures(commands.txt2img), """
  ldm txt2img "a red cube on top of a blue sphere"
  ldm txt2img "a green cone behind a yellow cylinder" --n 9 --seed 7 --sheet
  ldm txt2img "a lighthouse in a storm" --ckpt v1-5-pruned-emaonly.safetensors --steps 30 --out lighthouse.png
  ldm txt2img "a lighthouse, (storm:1.3)" --ckpt v1-5-pruned-emaonly.safetensors --lora engraving.safetensors:0.8 --hires 2x
  ldm txt2img "a lighthouse" --ckpt sd_xl_base_1.0.safetensors --refiner sd_xl_refiner_1.0.safetensors --refine-from 0.8
  ldm txt2img "a red cube" --seed 7 --grid-of cfg=1.5,2,3,4,5,6,7,8 --grid-of sampler=ddim,plms"""),
    "img2img": Command("redraw a picture as a prompt says", options.img2img, _pictures(commands.img2img), """
  ldm img2img "a purple cone on top of a blue sphere" --init outputs/00001.png --strength 0.7
  ldm img2img "an oil painting of a harbour" --init photo.jpg --width 512 --ckpt v1-5-pruned-emaonly.safetensors"""),
    "inpaint": Command("paint a part of a picture anew", options.inpaint, _pictures(commands.inpaint), """
  ldm inpaint "a red cube on top of a blue sphere" --init outputs/00001.png --mask mask.png --feather 4
  ldm inpaint "a cat on a bench" --init bench.png --mask-from alpha --ckpt sd-v1-5-inpainting.ckpt"""),
    "outpaint": Command("go on beyond the borders of a picture", options.outpaint, _pictures(commands.outpaint), """
  ldm outpaint "a red cube on top of a blue sphere" --init outputs/00001.png --extend left=32 --extend right=32
  ldm outpaint "a wide beach" --init beach.jpg --extend right=256 --feather 16 --ckpt 512-inpainting-ema.safetensors"""),
    "depth2img": Command("draw other things in the shapes of a picture", options.depth2img, _pictures(commands.depth2img), """
  ldm depth2img "a robot in a workshop" --init portrait.jpg --strength 0.9 --ckpt 512-depth-ema.safetensors
  ldm depth2img "a marble hall" --init hall.png --depth hall-depth.png --ckpt 512-depth-ema.safetensors"""),
    "upscale": Command("make a picture four times as wide and high", options.upscale, _pictures(commands.upscale), """
  ldm upscale "a white cat" --init small.png --noise-level 20 --ckpt x4-upscaler-ema.safetensors
  ldm upscale "" --init large.jpg --window 128 --ckpt x4-upscaler-ema.safetensors"""),
    "variations": Command("draw pictures like another one", options.variations, _pictures(commands.variations), """
  ldm variations --init painting.jpg --n 4 --sheet --ckpt sd-clip-vit-l14-img-embed_ema_only.ckpt"""),
    "hires": Command("draw large: small, enlarged, redrawn", options.hires, _pictures(commands.txt2img), """
  ldm hires "a red cube on top of a blue sphere" --scale 2x
  ldm hires "a lighthouse in a storm" --scale 1.5x --enlarge latent --strength 0.7 --ckpt v1-5-pruned-emaonly.safetensors"""),
    "interpolate": Command("go from prompt to prompt, or seed to seed", options.interpolate, making.animate, """
  ldm interpolate "a red cube" "a blue sphere" --frames 24 --fps 12
  ldm interpolate "a red cube on top of a blue sphere" --seeds 1,2,3 --animation gif"""),
    "inspect": Command("say what files of weights are", inspecting.add_inspect, inspecting.inspect, """
  ldm inspect v1-5-pruned-emaonly.safetensors
  ldm inspect --hash v1-5-pruned-emaonly.safetensors
  ldm inspect *.safetensors --json
  ldm inspect engraving.safetensors --keys '*attn2*'"""),
    "diff": Command("compare two files of weights", differing.add_diff, differing.diff, """
  ldm diff v1-5-pruned-emaonly.ckpt v1-5-pruned-emaonly.safetensors
  ldm diff v1-5-pruned-emaonly.safetensors dreamshaper_8.safetensors --quick
  ldm diff v1-5-pruned-emaonly.safetensors mix.safetensors --third dreamshaper_8.safetensors"""),
    "convert": Command("weights in another container, layout or type of numbers", converting.add_convert, converting.convert, """
  ldm convert v1-5-pruned.ckpt v1-5.safetensors
  ldm convert sd_xl_base_1.0.safetensors sdxl/ --dtype fp16 --shard-size 2GB
  ldm convert my-finetune/ my-finetune.safetensors --manifest where-it-went.json
  ldm convert v1-5-pruned.ckpt v1-5-ema-fp16.safetensors --ema --prune --dtype fp16
  ldm convert 768-v-ema.ckpt vae.safetensors --only vae"""),
    "merge": Command("merge two or three models into one", converting.add_merge, converting.merge, """
  ldm merge a.safetensors b.safetensors --out ab.safetensors --alpha 0.3
  ldm merge a.ckpt b.safetensors --out ab.safetensors --blocks IN00=0.2,MID=0.5,OUT11=0.9,TEXT=0,VAE=0 --dtype fp16
  ldm merge sd-v1-5-inpainting.ckpt style.safetensors v1-5-pruned.ckpt --out style-inpainting.safetensors --method add-difference --alpha 1"""),
    "lora": Command("extract, merge, resize or convert LoRA files", lora.add_lora, lora.lora, """
  ldm lora extract v1-5-pruned-emaonly.safetensors tuned.safetensors --variance 0.95 --max-rank 64 --out tuned-lora.safetensors
  ldm lora merge v1-5-pruned-emaonly.safetensors engraving.safetensors:0.8 lines.safetensors --out engraved.safetensors
  ldm lora resize engraving.safetensors --rank 8 --out small.safetensors
  ldm lora convert engraving.safetensors --to diffusers --out pytorch_lora_weights.safetensors"""),
    "repair": Command("repair a damaged file of weights", converting.add_repair, converting.repair, """
  ldm repair merged.safetensors
  ldm repair old.ckpt --dry-run
  ldm repair old.ckpt --out sound.safetensors"""),
    "prune": Command("take blocks out of a model, for a student to begin with", converting.add_prune, converting.prune, """
  ldm prune sd_xl_base_1.0.safetensors student.safetensors --plan ssd-1b
  ldm prune v1-5-pruned.safetensors small.safetensors --plan half --dtype fp32"""),
    "train": Command("train a model, LoRA, word or autoencoder", training.add_train, training.train, """
  ldm train
  ldm train sygil --show
  ldm train sygil --set data.path=photos --set model.start=v1-5-pruned.safetensors --out runs/photos
  ldm train my-lora.toml --set optimizer.lr=2e-4"""),
    "samplers": Command("list samplers and grids", options.samplers, options.show, """
  ldm samplers --steps 10"""),
}  # fmt: skip


def readers() -> Readers:
    """What commands ask of the package `weights`."""
    return Readers(
        load=weights.load, load_vae=weights.load_vae, load_lora=load_lora, load_embedding=load_embedding, load_safety=weights.load_safety,
        open_file=weights.open_file, embedded=embedded, save=weights.save, package=weights,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, as listed in terminal.EXIT_CODES. Errors are one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # no name or prompt is unprintable
    try:
        with terminal.warnings_in_a_line(), terminal.termination_as_exception():
            args = arguments.parse(COMMANDS, argv)
            COMMANDS[args.command].run(args, readers())
            return 0
    except SystemExit as done:  # --help, --version
        return done.code or 0
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or the interpreter complains when it closes stdout
        return 141
    except (KeyboardInterrupt, terminal.Terminated) as stop:
        terminal.say("ldm: stopped; the pictures listed are complete")
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    except Exception as error:
        if "--debug" in (sys.argv[1:] if argv is None else argv):
            traceback.print_exc()
        text, code = terminal.explain(error)
        terminal.say(f"ldm: error: {text}")
        return code


if __name__ == "__main__":
    sys.exit(main())
