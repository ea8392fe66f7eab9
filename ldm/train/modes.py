"""The parameters that a run trains, and its task: one function for each kind of training."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.changes import surgery
from ldm.changes.inversion import as_embedding, new_token
from ldm.changes.lora_layers import DecomposedFactors, Spec, attach
from ldm.conditioning.prompts import Embedding
from ldm.model import LatentDiffusion
from ldm.train.distil import Distil
from ldm.train.ranks import put
from ldm.train.recipe import Method, Objective, Recipe, wrong_key
from ldm.train.tasks import Autoencoding, Diffusion, Task, places


@dataclass(frozen=True)
class Trainee:
    """The model, task and parameters that a run trains."""

    model: LatentDiffusion  # the one that is saved and draws the validation pictures; with teachers, the student
    task: Task
    # parameters that change: {name in the model, or in what was added to it: name in the task}
    places: Mapping[str, str]
    embeddings: tuple[Embedding, ...] = ()  # words that are learnt, for prompts
    frozen: tuple[nn.Module, ...] = ()  # networks beside the model that do not change: teachers

    @classmethod
    def of(cls, model: LatentDiffusion, task: Task, parameters: Mapping[str, nn.Parameter], **more: Any) -> Trainee:
        """A trainee with these parameters, which the task holds."""
        return cls(model, task, places(task, parameters), **more)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that change, by name, as the task holds them now: FSDP puts other objects in their places."""
        return {name: self.task.get_parameter(place) for name, place in self.places.items()}

    @contextmanager
    def wearing(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """While this is open the parameters have these values, such as averaged ones, whole or shared among ranks."""
        before = {name: p.detach().clone() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            put(p, values[name])
        try:
            yield
        finally:
            for name, p in self.parameters.items():
                put(p, before[name])


def full(model: LatentDiffusion, recipe: Recipe, teachers: Sequence[LatentDiffusion]) -> Trainee:
    """Fine-tuning: the networks' own parameters, those whose names `targets` finds."""
    parameters = _chosen(model, recipe.method)
    trains_text = any(name.startswith("text.") for name in parameters)
    task = Diffusion(model, recipe.objective, batch=recipe.run.batch, trains_text=trains_text)
    return Trainee.of(model, task, parameters)


def lora(model: LatentDiffusion, recipe: Recipe, teachers: Sequence[LatentDiffusion]) -> Trainee:
    """Low-rank changes beside frozen weights (Hu et al. 2021)."""
    m = recipe.method
    alphas = {"alpha": m.alpha or None, "conv_alpha": m.conv_alpha or None}
    spec = Spec(m.rank, conv_rank=m.conv_rank, dora=m.dora, targets=m.targets, unet=m.unet, text=m.text, **alphas)
    parameters = attach(model, spec, seed=recipe.run.seed)
    task = Diffusion(model, recipe.objective, batch=recipe.run.batch, trains_text=m.text)
    return Trainee.of(model, task, parameters)


def inversion(model: LatentDiffusion, recipe: Recipe, teachers: Sequence[LatentDiffusion]) -> Trainee:
    """A new word, and nothing else (Gal et al. 2022)."""
    m = recipe.method
    parameters = new_token(model, m.token, m.token_from, m.vectors)
    word = as_embedding(m.token, parameters)
    task = Diffusion(model, recipe.objective, batch=recipe.run.batch, trains_text=True, embeddings=[word])
    task.words = nn.ParameterDict({name.replace(".", "_"): p for name, p in parameters.items()})
    return Trainee.of(model, task, parameters, embeddings=(word,))


def vae(model: LatentDiffusion, recipe: Recipe, teachers: Sequence[LatentDiffusion]) -> Trainee:
    """The autoencoder."""
    named = {f"vae.{name}": p for name, p in model.vae.named_parameters()}
    task = Autoencoding(model.vae, recipe.objective.kl_weight)
    return Trainee.of(model, task, _targeted(named, recipe.method.targets))


def distill(model: LatentDiffusion, recipe: Recipe, teachers: Sequence[LatentDiffusion]) -> Trainee:
    """A student with fewer blocks, taught by the model it is pruned from or others of its family (Kim et al. 2023)."""
    m, run = recipe.method, recipe.run
    student = surgery.prune(model, m.plan)
    parameters = _chosen(student, m)
    for teacher in teachers:
        if teacher.config.prediction != student.config.prediction:
            what = f"one predicts {teacher.config.prediction}, the student {student.config.prediction}"
            raise wrong_key("method.teachers", f"{what}; give teachers that predict the same")
    unets = [teacher.unet for teacher in teachers] or [model.unet]
    own = Diffusion(student, recipe.objective, batch=run.batch)
    weights = {"output_weight": m.output_weight, "feature_weight": m.feature_weight}
    task = Distil(own, unets, steps=run.steps, batch=run.batch, **weights)
    return Trainee.of(student, task, parameters, frozen=tuple(unets))


KINDS: Mapping[str, Callable[[LatentDiffusion, Recipe, Sequence[LatentDiffusion]], Trainee]] = {
    "full": full, "lora": lora, "inversion": inversion, "vae": vae, "distill": distill,
}  # fmt: skip


def trainee(model: LatentDiffusion, recipe: Recipe, teachers: Sequence[LatentDiffusion] = ()) -> Trainee:
    """What the recipe's method trains of a model; all the rest is frozen. Raises ArgumentError."""
    if recipe.objective.whole_hole != Objective.whole_hole and not {"mask", "masked_image"} & set(model.config.concat):
        what = f"family {model.config.name} takes no mask; leave it out, or widen the model"
        raise wrong_key("objective.whole_hole", what)
    model.requires_grad_(False)
    return freeze(KINDS[recipe.method.kind](model, recipe, teachers), recipe)


def freeze(made: Trainee, recipe: Recipe) -> Trainee:
    """Freeze all that is not trained, and hold its matrices in the type of the run's arithmetic; return the trainee."""
    made.model.requires_grad_(False)
    made.task.requires_grad_(False)
    for p in made.parameters.values():
        p.requires_grad_(True)
    if recipe.run.dtype != "float32":
        # a full run saves the frozen networks too, and keeps their precision
        beside = [made.model.unet, *made.model.text] if recipe.method.kind in ("lora", "inversion") else []
        for network in (*beside, *made.frozen):
            hold_in(network, getattr(torch, recipe.run.dtype))
    return made


def hold_in(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep a network's frozen matrices as autocast rounds them; not DoRA's, which change in float32 before that."""
    for module in network.modules():
        is_dora = isinstance(getattr(module, "lora", None), DecomposedFactors)
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not is_dora:
            for p in (module.weight, module.bias):
                if p is not None and not p.requires_grad:
                    p.data = p.data.to(dtype)


def unused(model: LatentDiffusion) -> re.Pattern[str]:
    """Names of unused parameters: layers of a text tower after the one that is read, unless its pooled text is used."""
    names: list[str] = []
    for i, tower in enumerate(model.config.text):
        if i != model.config.pooled_tower:
            layers = range(tower.layers - tower.skip, tower.layers)
            names += [rf"text\.{i}\.text_model\.encoder\.layers\.{layer}\." for layer in layers]
            names += [] if tower.norm else [rf"text\.{i}\.text_model\.final_layer_norm\."]
            names.append(rf"text\.{i}\.text_projection")
    return re.compile("|".join(names) or r"(?!)")


def _chosen(model: LatentDiffusion, method: Method) -> dict[str, nn.Parameter]:
    """The parameters of UNet and text towers that a method trains."""
    networks = tuple(network for network, learns in (("unet.", method.unet), ("text.", method.text)) if learns)
    dead = unused(model)
    named = {name: p for name, p in model.named_parameters() if name.startswith(networks) and not dead.match(name)}
    return _targeted(named, method.targets)


def _targeted(named: Mapping[str, nn.Parameter], targets: str) -> dict[str, nn.Parameter]:
    found = {name: p for name, p in named.items() if re.search(targets, name)}
    if not found:
        what = f"{targets[:60]!r} is found in no parameter's name; leave it out for all of them"
        raise wrong_key("method.targets", what)
    return found
