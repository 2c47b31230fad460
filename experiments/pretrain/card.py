"""The model card, from what the run left on disk, and the export that carries it."""

import json
from pathlib import Path

from . import encoders, export, loop

TEXT = """---
license: cc-by-4.0
tags: [clip, medical, anomaly-detection]
---
# compact_clip

A small CLIP in Hugging Face format (FlaxCLIPModel and CLIPModel both load it), for first runs,
tests and users without access to a model hub. Not a medical device.

**Shape.** Image encoder: ViT, width {width}, {layers} layers, {heads} heads, patch {patch}, image
{image}. Text encoder: width {text_width}, {text_layers} layers, context {context}. Joint width
{joint}. Own byte-pair vocabulary of {vocabulary} entries in CLIP's file format.

**Data.** {images} images: {sources}. Captions in many wordings, made from modality, plane, state
and finding{findings}. Phrases without images: Disease Ontology labels (CC0), CheXpert labeler
mentions (MIT), anatomy and modality names.

**Teachers.** EfficientNet-Lite0 (ImageNet, Apache-2.0) for patches; all-MiniLM-L6-v2 (Apache-2.0)
for what phrases mean. Neither is needed to use this model.

**Recipe.** {start} AdamW {rate}, cosine over the budget, batch {batch}, seed {seed}; {views} views
(crop 50-100%, turn, brightness, contrast, gamma; mirrored at random), {patches} patches per image
and step, all of them in the last {tail:.0%}. Loss: Huber to standardised teacher features (stride 8
against layer {middle}, stride 16 against layer {layers}, pooled against the class token), squared
difference between our and the teacher's token cosines, CLIP's contrastive loss with every true
caption as a positive (class token, and mean of patches), and 1 - cosine of a linear map of phrase
embeddings to MiniLM's; weights {weights}. Exported: running average of the weights (.005 a step).

**Run.** {steps:,} steps, {seen:,} image views, {minutes:.0f} minutes.

**Leak check** (correlation of 24x24 thumbnails over .95):

| evaluation set | images | near-duplicates in training | highest correlation | rule |
|---|---|---|---|---|
{leaks}

Chest films of different children correlate that highly; there, patients are disjoint instead.

**Results** (image AUROC of the package's methods `zero_shot` and `memory`, mean ± sd over draws):

{results}

**Limits.** Where it has seen captions of brain tumours, pneumonia or breast masses, say so beside
its zero-shot numbers. Outside the modalities above it knows no more than its teachers' general
shape. Text beyond {length} tokens was never trained.
"""


def leak_table(run: Path) -> str:
    sets = json.loads((run / "leaks.json").read_text())["sets"]
    return "\n".join(
        f"| {s['name']} | {s['evaluation_images']} | {s['near_duplicates']} | {s['highest']:.3f} | "
        f"{'excluded' if s['excluded'] else 'patients disjoint'} |"
        for s in sets
    )


def start_text(init: str | None) -> str:
    if init is None:
        return "From random weights."
    return f"The image encoder starts from the checkpoint `{init}`, the text encoder at random."


def card_text(run: Path, config, steps: int, elapsed: float) -> str:
    """The card; results come from results.md of the run folder, which `--judge` writes."""
    plan = json.loads((run / "plan.json").read_text())
    data = json.loads((run / "leaks.json").read_text())
    v, t, results = config.vision_config, config.text_config, run / "results.md"
    return TEXT.format(
        width=v.hidden_size,
        layers=v.num_hidden_layers,
        middle=v.num_hidden_layers // 2,
        heads=v.num_attention_heads,
        patch=v.patch_size,
        image=v.image_size,
        text_width=t.hidden_size,
        text_layers=t.num_hidden_layers,
        context=t.max_position_embeddings,
        vocabulary=t.vocab_size,
        joint=config.projection_dim,
        images=data["training_images"],
        sources=", ".join(f"{n} of {name}" for name, n in data["sources"].items()),
        findings="" if plan["findings"] else " (every finding, normal and abnormal left out)",
        start=start_text(plan["init"]),
        rate=plan["rate"],
        batch=plan["batch"],
        seed=plan["seed"],
        views=f"{plan['shards'] * 512:,}",
        patches=plan["patches"],
        tail=plan["full_tail"],
        weights=", ".join(f"{name} {x:g}" for name, x in plan["weights"].items()),
        steps=steps,
        seen=steps * plan["batch"],
        minutes=elapsed / 60,
        leaks=leak_table(run),
        results=results.read_text() if results.exists() else "not yet measured",
        length=loop.LENGTH,
    )


def export_run(run: Path, folder: Path, half: bool) -> None:
    """The Hugging Face folder of the run's latest checkpoint (the averaged weights)."""
    plan = json.loads((run / "plan.json").read_text())
    vocabulary = len(json.loads((run / "tokenizer" / "vocab.json").read_text()))
    config = encoders.make_config(vocabulary, width=plan["width"], heads=plan["width"] // 64)
    model = encoders.build(config)
    template = loop.start(encoders.init(model, 0), model, 0)
    state, steps, elapsed = loop.restore(run / "checkpoint.safetensors", template)
    text = card_text(run, config, steps, elapsed)
    export.write_folder(folder, state.average, config, run / "tokenizer", text, half)
