"""The model card, from what the run left on disk, and the export that carries it."""

import json
from pathlib import Path

from safetensors import safe_open

from . import export, tower

TEXT = """---
license: cc-by-4.0
tags: [clip, medical, anomaly-detection]
---
# compact_clip

A small CLIP in Hugging Face format (FlaxCLIPModel and CLIPModel both load it), for first runs,
tests and users without access to a model hub. Not a medical device.

**Shape.** Image tower: ViT, width {width}, {layers} layers, {heads} heads, patch 16, image
{image}. Text tower: width {text_width}, {text_layers} layers, context {context}. Joint width
{joint}. Own byte-pair vocabulary of {vocabulary} entries in CLIP's file format.

**Data.** {images} images: BRISC brain MRI (CC BY 4.0), Kermany paediatric chest films (CC BY
4.0), NIH ChestX-ray14 (no restrictions, attribution), BUS-UCLM breast ultrasound (CC BY 4.0).
Captions in many wordings, made from modality, plane, state and finding{findings}. Phrases without
images: Disease Ontology labels (CC0), CheXpert labeler mentions (MIT), anatomy and modality
names.

**Teachers.** EfficientNet-Lite0 (ImageNet, Apache-2.0) for patches; all-MiniLM-L6-v2 (Apache-2.0)
for what phrases mean. Neither is needed to use this model.

**Recipe.** {start} AdamW {rate}, cosine over the time budget, batch {batch}, seed {seed}; {views}
views (crop 50-100%, turn, brightness, contrast, gamma; mirrored at random), {patches} of 196
patches per image and step, all of them in the last {tail:.0%}. Loss: Huber to standardised
teacher features (stride 8 against layer {middle}, stride 16 against layer {layers}, pooled
against the class token) + 4 x squared difference between our and the teacher's token cosines
(pairs over the whole batch) + CLIP's contrastive loss with every true caption as a positive
(class token .15, mean of patches .1) + .5 x (1 - cosine) of a linear map of phrase embeddings to
MiniLM's. Exported: running average of the weights (.005 a step).

**Run.** {steps} steps, {seen} image views, {minutes:.0f} minutes on 2 shared CPU cores.

**Leak check** (correlation of 24x24 thumbnails over .95):

| evaluation set | images | near-duplicates in training | highest correlation | rule |
|---|---|---|---|---|
{leaks}

Chest films of different children correlate that highly; there, patients are disjoint instead.

**Results** (image AUROC, mean and sd over 5 draws; memory = nearest-neighbour cosine distance of
3x3 pooled patch tokens of layers {middle} and {layers}, mean over patches, 32 healthy images at
random as pool of which K are used; zero-shot = 4 + 4 phrases):

{results}

**Limits.** It has seen captions of brain tumours, pneumonia and breast masses from other sets:
say so wherever its zero-shot numbers stand (without findings in the captions they fall to chance,
docs/embedded_clip.md of the project). 7,552 images and three modalities: outside brain MRI,
chest films and breast ultrasound it knows no more than its teachers' general shape. The chest
films it saw of healthy children and the NIH films of adults differ in source, so part of what
"pneumonia" means to it may be the source. Text beyond {length} tokens was never trained.
"""


def leak_table(run: Path) -> str:
    told = json.loads((run / "leaks.json").read_text())["sets"]
    return "\n".join(
        f"| {s['name']} | {s['evaluation_images']} | {s['near_duplicates']} | {s['highest']:.3f} | "
        f"{'excluded' if s['excluded'] else 'patients disjoint'} |"
        for s in told
    )


def start_text(init: str | None) -> str:
    if init is None:
        return "From random weights."
    return f"The image tower starts from the checkpoint `{init}`, the text tower at random."


def card_text(run: Path, size: tower.Size, steps: int, elapsed: float) -> str:
    """The card; results come from results.md of the run folder, which `--judge` writes."""
    plan = json.loads((run / "plan.json").read_text())
    results = run / "results.md"
    return TEXT.format(
        **size._asdict(),
        middle=size.layers // 2,
        images=json.loads((run / "leaks.json").read_text())["training_images"],
        findings="" if plan["findings"] else " (every finding, normal and abnormal left out)",
        start=start_text(plan["init"]),
        rate=plan["rate"],
        batch=plan["batch"],
        seed=plan["seed"],
        views=f"{plan['shards'] * 512:,}",
        patches=plan["patches"],
        tail=plan["full_tail"],
        steps=f"{steps:,}",
        seen=f"{steps * plan['batch']:,}",
        minutes=elapsed / 60,
        leaks=leak_table(run),
        results=results.read_text() if results.exists() else "not yet measured",
        length=32,
    )


def export_run(run: Path, folder: Path, half: bool) -> None:
    """The Hugging Face folder of the run's latest checkpoint (the averaged weights)."""
    vocabulary = len(json.loads((run / "tokenizer" / "vocab.json").read_text()))
    with safe_open(run / "checkpoint.safetensors", "numpy") as file:
        about = file.metadata()
        names = tower.init(tower.Size(vocabulary=vocabulary), 0)
        clip = {name: file.get_tensor(f".average['{name}']") for name in names}
    size = tower.Size(vocabulary=vocabulary)
    text = card_text(run, size, int(about["step"]), float(about["elapsed"]))
    export.write_folder(folder, clip, size, run / "tokenizer", text, half)
