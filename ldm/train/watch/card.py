"""The "Training" section of a model card, written from the recipe."""

from __future__ import annotations

from ldm.train.recipe import Card, Method, Optimizer, Recipe, Run, Start

WATTS = 250.0  # of an A100 PCIe 40 GB, which the cards of Stable Diffusion 1 and 2 were trained on
# after both of these cards: 150,000 hours are 11,250 kg CO2 eq., and 200,000 are 15,000: 0.075 kg per GPU-hour
KG_PER_KWH = 0.3


def kwh(hours: float, watts: float = WATTS) -> float:
    """Energy of so many GPU-hours."""
    return hours * watts / 1000


def kg_co2(hours: float, watts: float = WATTS) -> float:
    """CO2 equivalent of so many GPU-hours, kg, as the Stable Diffusion cards reckon it (Lacoste et al. 2019)."""
    return kwh(hours, watts) * KG_PER_KWH


def training_section(recipe: Recipe) -> str:
    """Markdown. The numbers are the recipe's; hardware, hours and notes are those of the card that it follows."""
    run, card = recipe.run, recipe.card
    checkpointing = ", gradient checkpointing" if run.checkpointing else ""
    averaging = f", averaged weights with decay {run.ema:g}" if run.ema else ""
    facts = {
        "Follows": f"the card of {card.model}" if card.model else "",
        "Start": recipe.model.start or "the model that ships",
        "Method": _method(recipe.model, recipe.method),
        "Resolution": f"{recipe.data.size} pixels" if recipe.data.size else "the model's",
        "Hardware": card.hardware or ("the card does not say" if card.model else ""),
        "Optimizer": _optimizer(recipe.optimizer),
        "Learning rate": _rate(recipe.optimizer),
        "Batch": _batch(run, card.gpus or 1),
        "Steps": f"{run.steps:,}",
        "Precision": f"{run.dtype}{checkpointing}{averaging}",
        "Energy and CO2": _energy(card),
    }
    head = ["## Training", "", *([recipe.about, ""] if recipe.about else [])]
    lines = [f"- **{name}:** {what}" for name, what in facts.items() if what]
    return "\n".join([*head, *lines, *(f"- {note}" for note in card.notes), ""])


def _method(model: Start, method: Method) -> str:
    learns = " and ".join(name for name, does in (("UNet", method.unet), ("text towers", method.text)) if does)
    what = {
        "full": f"fine-tuning of {learns}",
        "lora": f"LoRA of {learns}, rank {method.rank}",
        "inversion": f"textual inversion of {method.token}",
        "distill": f"distillation of a student pruned by plan {method.plan}",
    }.get(method.kind, method.kind)
    if method.targets:
        what += f", where names match `{method.targets}`"
    if model.widen:
        what += f"; conv_in widened by {' and '.join(model.widen)}"
    if model.vision:
        what += "; a picture's embedding in place of text"
    return what


def _optimizer(o: Optimizer) -> str:
    kind = {"adamw": "AdamW", "adamw8bit": "AdamW, 8 bits"}[o.kind]
    return f"{kind}, betas {o.betas[0]:g} and {o.betas[1]:g}, weight decay {o.weight_decay:g}, epsilon {o.eps:g}"


def _rate(o: Optimizer) -> str:
    start = f"the last of {o.lr_from}" if o.lr_from else f"{o.lr:g}"
    then = {
        "constant": "constant",
        "linear": f"linear decay over the last {o.decay:.0%}",
        "cosine": "cosine",
        "cosine-restarts": f"cosine with restarts, {o.cycles} cycle{_s(o.cycles)}",
    }[o.schedule]
    return f"warm-up to {start} for {o.warmup:,} steps, then {then}" if o.warmup else f"{start}, {then}"


def _batch(run: Run, gpus: int) -> str:
    """The batch as a product, where it is a multiple of the card's GPUs times the micro-batch."""
    times, rest = divmod(run.batch, gpus * run.micro)
    if rest:
        return f"{run.batch}"
    return f"{gpus} GPU{_s(gpus)} x {times} gradient accumulation{_s(times)} x {run.micro} = {run.batch}"


def _s(count: int) -> str:
    return "s" * (count > 1)


def _energy(card: Card) -> str:
    if not card.hours:
        return "the card gives no hours" if card.model else ""
    hours, watts = card.hours, card.watts or WATTS
    return (
        f"{hours:,.0f} GPU-hours, {kwh(hours, watts):,.0f} kWh at {watts:g} W, {kg_co2(hours, watts):,.0f} kg CO2 eq."
    )
