"""The model card, from what the run left on disk, and the export that carries it."""

import json
from pathlib import Path

from medclip_jax.data import catalog

from . import captions, encoders, export, leaks, loop, views

TEXT = Path(__file__).with_name("card.md").read_text()  # with fields in braces


def leak_table(sets: list[dict]) -> str:
    return "\n".join(
        f"| {s['name']} | {s['evaluation_images']} | {s['candidates']} | {s['limit']:.3f} | "
        f"{s['leaks']} | {max(s['highest'], 0):.3f} |"
        for s in sets
    )


def start_text(init: str | None) -> str:
    if init is None:
        return "From random weights."
    return f"The image encoder starts from the checkpoint `{init}`, the text encoder at random."


def card_text(run: Path, config, done: loop.Done) -> str:
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
        images=sum(n for *_, n in data["sources"]),
        sources="\n".join(f"| {' | '.join(map(str, row))} |" for row in data["sources"]),
        findings="" if plan["findings"] else " (every finding, normal and abnormal left out)",
        seen=findings_text() if plan["findings"] else "none",
        start=start_text(plan["init"]),
        seed=plan["seed"],
        views=f"{plan['shards'] * views.SHARD:,} views"
        if plan["shards"]
        else "New views in every step",
        phases="\n".join(f"- from step {n:,}: {phase}" for n, phase in plan["phases"]),
        warm_up=loop.WARM_UP,
        decay=decay_text(run, on_device=not plan["shards"]),
        limit=leaks.LIMIT,
        others=", ".join(catalog.OTHER_PATIENTS),
        steps=done.steps,
        shown=shown(run, plan, done),
        minutes=done.seconds / 60,
        leaks=leak_table(data["sets"]),
        results=results.read_text() if results.exists() else "not yet measured",
        length=loop.LENGTH,
    )


def findings_text() -> str:
    named = {name: m.findings for name, m in captions.MODALITIES.items()}
    return "; ".join(f"{name}: {', '.join(found)}" for name, found in named.items())


def shown(run: Path, plan: dict, done: loop.Done) -> int:
    """Views of images in all steps; those of the decay may be of another batch."""
    if not (run / "decay.json").is_file():
        return done.steps * plan["batch"]
    about = json.loads((run / "decay.json").read_text())
    return (done.steps - about["steps"]) * plan["batch"] + about["steps"] * about["batch"]


def decay_text(run: Path, on_device: bool) -> str:
    """How the last steps differed, if the decay was run."""
    if not (run / "decay.json").is_file():
        return ""
    about = json.loads((run / "decay.json").read_text())
    steps = about["steps"]
    whole = steps if on_device else min(steps, loop.WHOLE)
    parts = ", ".join(
        f"{name.replace('_', ' ')} {x:g}" for name, x in about["weights"].items() if x
    )
    return (
        f"\n- the last {steps:,} steps: the rate falls to 0; batch {about['batch']}; the last "
        f"{whole} see all patches; weights: {parts}"
    )


def export_run(run: Path, folder: Path, half: bool) -> None:
    """The Hugging Face folder of the decayed weights, else of the latest checkpoint's."""
    plan = json.loads((run / "plan.json").read_text())
    vocabulary = len(json.loads((run / "tokenizer" / "vocab.json").read_text()))
    width, layers = plan["width"], plan["layers"]
    config = encoders.make_config(vocabulary, width=width, layers=layers, heads=width // 64)
    model = encoders.build(config)
    template = loop.start(encoders.init(model, 0), model, 0)
    decayed = run / "decayed.safetensors"
    path = decayed if decayed.is_file() else run / "checkpoint.safetensors"
    state, done = loop.restore(path, template)
    text = card_text(run, config, done)
    export.write_folder(folder, state.params["clip"], config, run / "tokenizer", text, half)
