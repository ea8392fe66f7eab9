"""Other people's names for the parameters that `ldm` names: so far those of the original SD 1 code and its fine-tunes."""

from __future__ import annotations

import re

_TOWER = re.compile(r"(cond_stage_model\.transformer\.)((?:embeddings|encoder|final_layer_norm)\.)")


def canonical(key: str) -> str:
    """The original spelling of a key.

    Files saved with old or very new versions of transformers lack `text_model.` in the names of the text tower.
    """
    return _TOWER.sub(r"\1text_model.\2", key, count=1) if key.startswith("cond_stage_model.") else key


def ema(key: str) -> str:
    """Where the original's LitEma keeps the moving average of `key`, which must begin with `model.`.

    It is stored under the name inside `self.model` without any dots, so this can be computed but not inverted.
    """
    return "model_ema." + key.removeprefix("model.").replace(".", "")
