"""Which parameters a run trains, and on what task: one function for each kind of training."""

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
from ldm.errors import ArgumentError
from ldm.model import LatentDiffusion
from ldm.train.distil import Distil
from ldm.train.ranks import like
from ldm.train.recipe import Objective, Recipe
from ldm.train.tasks import Autoencoding, Diffusion


@dataclass(frozen=True)
class Trainee:
    """What a run trains."""

    model: LatentDiffusion  # as it is saved and pictured; the student, where there is a teacher
    task: nn.Module  # (batch, draws) -> Loss
    places: Mapping[
        str, str
    ]  # parameters that change: their names in the model, or in what was added to it, and in the task
    embeddings: tuple[Embedding, ...] = ()  # words that are learnt, for prompts
    frozen: tuple[nn.Module, ...] = ()  # networks beside the model that do not change: teachers

    @classmethod
    def of(
        cls, model: LatentDiffusion, task: nn.Module, parameters: Mapping[str, nn.Parameter], **more: Any
    ) -> Trainee:
        """With the parameters as the task holds them."""
        found = {id(p): place for place, p in task.named_parameters()}
        return cls(model, task, {name: found[id(p)] for name, p in parameters.items()}, **more)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What changes, by name, as the task has it now: FSDP puts other objects in its places."""
        return {name: self.task.get_parameter(place) for name, place in self.places.items()}

    @contextmanager
    def wearing(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """The parameters with these values, such as the averaged ones, whole or shared as they are, for as long as the block lasts."""
        parameters = self.parameters
        before = {name: p.detach().clone() for name, p in parameters.items()}
        _put(parameters, values)
        try:
            yield
        finally:
            _put(parameters, before)


@torch.no_grad()
def _put(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, p in parameters.items():
        p.copy_(values[name] if hasattr(values[name], "full_tensor") else like(p, values[name]))


def full(model: LatentDiffusion, recipe: Recipe, teachers: Sequence[LatentDiffusion]) -> Trainee:
    """Fine-tuning: the networks' own parameters, those whose names `targets` finds."""
    parameters = _chosen(model, recipe)
    trains_text = any(name.startswith("text.") for name in parameters)
    return Trainee.of(
        model, Diffusion(model, recipe.objective, batch=recipe.run.batch, trains_text=trains_text), parameters
    )


def lora(model: LatentDiffusion, recipe: Recipe, teachers: Sequence[LatentDiffusion]) -> Trainee:
    """Low-rank changes beside frozen weights (Hu et al. 2021)."""
    m = recipe.method
    spec = Spec(
        rank=m.rank,
        alpha=m.alpha or None,
        conv_rank=m.conv_rank,
        conv_alpha=m.conv_alpha or None,
        dora=m.dora,
        targets=m.targets,
        unet=m.unet,
        text=m.text,
    )
    parameters = attach(model, spec, seed=recipe.run.seed)
    return Trainee.of(model, Diffusion(model, recipe.objective, batch=recipe.run.batch, trains_text=m.text), parameters)


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
    parameters = {
        f"vae.{name}": p for name, p in model.vae.named_parameters() if re.search(recipe.method.targets, f"vae.{name}")
    }
    return Trainee.of(model, Autoencoding(model.vae, recipe.objective.kl_weight), _some(parameters, recipe))


def distill(model: LatentDiffusion, recipe: Recipe, teachers: Sequence[LatentDiffusion]) -> Trainee:
    """A student with fewer blocks, taught by the model it was pruned from, or by others of that family (Kim et al. 2023)."""
    m = recipe.method
    student = surgery.prune(model, m.plan)
    parameters = _chosen(student, recipe)
    for teacher in teachers:
        if teacher.config.prediction != student.config.prediction:
            raise ArgumentError(
                f"method.teachers: one predicts {teacher.config.prediction}, the student {student.config.prediction}; give teachers that predict the same",
                key="method.teachers",
            )
    unets = [teacher.unet for teacher in teachers] or [model.unet]
    task = Distil(
        Diffusion(student, recipe.objective, batch=recipe.run.batch), unets, steps=recipe.run.steps, batch=recipe.run.batch,
        output_weight=m.output_weight, feature_weight=m.feature_weight,
    )  # fmt: skip
    return Trainee.of(student, task, parameters, frozen=tuple(unets))


KINDS: Mapping[str, Callable[[LatentDiffusion, Recipe, Sequence[LatentDiffusion]], Trainee]] = {
    "full": full, "lora": lora, "inversion": inversion, "vae": vae, "distill": distill,
}  # fmt: skip


def trainee(model: LatentDiffusion, recipe: Recipe, teachers: Sequence[LatentDiffusion] = ()) -> Trainee:
    """What the recipe's method makes of a model: everything frozen but what it trains. Raises ArgumentError."""
    if recipe.objective.whole_hole != Objective.whole_hole and not {"mask", "masked_image"} & set(model.config.concat):
        raise ArgumentError(
            f"objective.whole_hole: family {model.config.name} is told of no holes; leave it out, or widen the model",
            key="objective.whole_hole",
        )
    model.requires_grad_(False)
    return ready(KINDS[recipe.method.kind](model, recipe, teachers), recipe)


def ready(made: Trainee, recipe: Recipe) -> Trainee:
    """Everything frozen but what is trained, and held as tightly as changes nothing."""
    made.model.requires_grad_(False)
    made.task.requires_grad_(False)
    for p in made.parameters.values():
        p.requires_grad_(True)
    if recipe.run.dtype != "float32":
        dtype = getattr(torch, recipe.run.dtype)
        beside = (
            [made.model.unet, *made.model.text] if recipe.method.kind in ("lora", "inversion") else []
        )  # not where they are saved as they are
        for network in (*beside, *made.frozen):
            hold_in(network, dtype)
    return made


def hold_in(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen matrices of a network in the type that autocast would round them to each time: the same results in half the memory.

    Not those of DoRA, which are changed and measured in float32 before they are rounded.
    """
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not isinstance(
            getattr(module, "lora", None), DecomposedFactors
        ):
            for p in (module.weight, module.bias):
                if p is not None and not p.requires_grad:
                    p.data = p.data.to(dtype)


def unused(model: LatentDiffusion) -> re.Pattern[str]:
    """Names of parameters that no loss depends on: blocks of text towers after the one that is read, where no pooled text is told."""
    names = [r"text\.\d+\.text_projection"] if model.config.unet.vector_dim is None else []
    for i, tower in enumerate(model.config.text):
        if i != model.config.pooled_tower:
            names += [rf"text\.{i}\.text_model\.encoder\.layers\.{tower.layers - 1 - k}\." for k in range(tower.skip)]
            names += [] if tower.norm else [rf"text\.{i}\.text_model\.final_layer_norm\."]
            names.append(rf"text\.{i}\.text_projection")
    return re.compile("|".join(names) or r"(?!)")


def _chosen(model: LatentDiffusion, recipe: Recipe) -> dict[str, nn.Parameter]:
    m, dead = recipe.method, unused(model)
    networks = [network for network, learns in (("unet.", m.unet), ("text.", m.text)) if learns]
    found = {
        name: p
        for name, p in model.named_parameters()
        if name.startswith(tuple(networks)) and re.search(m.targets, name) and not dead.match(name)
    }
    return _some(found, recipe)


def _some(parameters: dict[str, nn.Parameter], recipe: Recipe) -> dict[str, nn.Parameter]:
    if not parameters:
        raise ArgumentError(
            f"method.targets: {recipe.method.targets[:60]!r} is found in no parameter's name; leave it out for all of them",
            key="method.targets",
        )
    return parameters
