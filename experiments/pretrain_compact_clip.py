"""Train the embedded CLIP: `--stage views`, then `texts`, `tokens`, `train`; `--export` any time.

`views` and `texts` run the teachers once (the only stages that need PyTorch and the packages named
in pretrain/teachers.py) and leave their answers in the run folder. `train` is JAX alone; the same
command resumes from its checkpoint. `--judge` measures CLIP folders with the package's methods.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
from pretrain import captions, encoders, leaks, loop, objective, views

from medclip_jax.clip import checkpoint

EVALUATION = {"BUSI": "busi", "BrainMRI": "brain_mri", "chest_xray": "chest_xray"}
DISJOINT_PATIENTS = {"chest_xray"}
REPEATS = {"breast ultrasound": 10}  # few images: shown more often
VOCABULARY = 6000
COMMON_WORDS = 6000
ROOT = Path(__file__).parents[1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with pretrain/, terminology/ ...")
    add("--run", type=Path, required=True, help="folder for caches and checkpoints")
    add("--stage", choices=("views", "texts", "tokens", "train"))
    add("--shards", type=int, default=60, help="shards of 512 views")
    add("--init", type=Path, help="CLIP folder whose image encoder is the starting point")
    add("--hours", type=float, default=1.5)
    add("--steps", type=int, help="a budget of steps in place of hours: exactly repeatable")
    add(
        "--weight",
        action="append",
        default=[],
        metavar="PART=X",
        help="weight of a part of the loss, as similarity=0",
    )
    add("--width", type=int, default=192, help="of the image encoder, a multiple of 64")
    add("--rate", type=float, default=8e-4)
    add("--seed", type=int, default=0)
    add("--no-findings", action="store_true", help="captions never tell disease from health")
    add("--export", type=Path, help="write the Hugging Face folder from the checkpoint")
    add("--judge", type=Path, nargs="+", help="CLIP folders to measure; results.md of the run")
    add("--half", action="store_true", help="export float16")
    return parser.parse_args()


def checked_rows(data: Path, run: Path) -> list[views.Row]:
    """Training rows that are in no evaluation set; the counts are left for the card."""
    rows = views.read_rows(data / "pretrain")
    files = [data / "pretrain" / "images" / row.image for row in rows]
    sets = {name: data / folder for name, folder in EVALUATION.items()}
    keep, counts = leaks.leak_check(files, sets, DISJOINT_PATIENTS)
    rows = [row for row, kept in zip(rows, keep, strict=True) if kept]
    report = {
        "training_images": len(rows),
        "sources": Counter(f"{row.source} ({row.modality}, {row.licence})" for row in rows),
        "sets": [c._asdict() for c in counts],
    }
    run.mkdir(parents=True, exist_ok=True)
    (run / "leaks.json").write_text(json.dumps(report, indent=1))
    return rows


def make_texts(data: Path, run: Path, rows: list[views.Row], seed: int, findings: bool) -> None:
    """phrases.json (image captions in their wordings, and the medical corpus), its embeddings, and
    common English words from the text teacher's vocabulary."""
    from pretrain import teachers

    rng = np.random.default_rng([seed, 17])
    texts = {captions.make_caption(r, rng, findings).text for r in rows}
    corpus = captions.phrase_corpus(data / "terminology", seed, findings)
    phrases = sorted(texts | set(corpus))
    np.save(run / "meaning.npy", teachers.phrase_embeddings(phrases))
    (run / "phrases.json").write_text(json.dumps(phrases))
    (run / "words.json").write_text(json.dumps(teachers.common_words(COMMON_WORDS)))


def make_tokens(run: Path) -> None:
    """The byte-pair vocabulary; frequent words count more so that they become single tokens."""
    from pretrain import tokens

    phrases = json.loads((run / "phrases.json").read_text())
    words = json.loads((run / "words.json").read_text())
    weighted = [w for place, w in enumerate(words) for _ in range(2 + 30 // (1 + place // 500))]
    size = tokens.write_tokenizer(run / "tokenizer", phrases * 3 + weighted, VOCABULARY)
    print(f"{size} entries")


def starting_point(init: Path | None, vocabulary: int, seed: int, width: int = 192):
    """Encoders and random parameters, the image encoder's replaced by those of `init` if given."""
    model = encoders.build(encoders.make_config(vocabulary, width=width, heads=width // 64))
    params = encoders.init(model, seed)
    if init is not None:
        theirs = checkpoint.load(str(init))
        if theirs.image_encoder.clone(levels=()) != model.image:
            raise SystemExit(f"{init}: its image encoder has another shape than --width {width}")
        params["vision_model"] = theirs.params["vision_model"]
    return model, params


def weights_of(assignments: list[str]) -> objective.Weights:
    """The loss weights with `PART=X` replaced. Ends with a sentence if a part is unknown."""
    weights = objective.Weights()
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        if name not in weights._fields:
            raise SystemExit(f"--weight {assignment}: give one of {', '.join(weights._fields)}")
        weights = weights._replace(**{name: float(value)})
    return weights


def load_material(run: Path, rows: list[views.Row], shards: int) -> loop.Material:
    from transformers import CLIPTokenizerFast

    read = views.read_shards(run / "views", shards)
    return loop.Material(
        shards=read,
        rows=rows,
        scales=loop.channel_scales(read),
        tokenizer=CLIPTokenizerFast.from_pretrained(run / "tokenizer"),
        phrases=json.loads((run / "phrases.json").read_text()),
        meaning=np.load(run / "meaning.npy"),
    )


def train(args: argparse.Namespace, rows: list[views.Row]) -> None:
    """Train until the budget is used up; plan.json says how."""
    material = load_material(args.run, rows, args.shards)
    model, params = starting_point(args.init, len(material.tokenizer), args.seed, args.width)
    plan = loop.Plan(
        hours=args.hours,
        steps=args.steps,
        rate=args.rate,
        seed=args.seed,
        findings=not args.no_findings,
        weights=weights_of(args.weight),
    )
    record = plan._asdict() | {"weights": plan.weights._asdict(), "width": args.width}
    record |= {"shards": len(material.shards), "init": args.init and args.init.name}
    (args.run / "plan.json").write_text(json.dumps(record, indent=1))
    state = loop.start(params, model, args.seed)
    loop.run(material, model, plan, state, args.run / "checkpoint.safetensors")


def main() -> None:
    args = arguments()
    if args.stage in ("views", "texts", "train"):
        rows = checked_rows(args.data, args.run)
    if args.stage == "views":
        from pretrain import teachers

        cache, data = args.run / "views", args.data / "pretrain"
        teachers.make_shards(data, rows, cache, args.shards, REPEATS, args.seed)
    elif args.stage == "texts":
        make_texts(args.data, args.run, rows, args.seed, not args.no_findings)
    elif args.stage == "tokens":
        make_tokens(args.run)
    elif args.stage == "train":
        train(args, rows)
    if args.judge:
        from pretrain import judge

        configs = [ROOT / "configs" / f"{name}.py" for name in judge.CONFIGS]
        fields = [f"data.root={args.data}"]
        table = judge.judge(args.judge, args.run / "judged", fields, configs)
        (args.run / "results.md").write_text(table)
        print(table)
    if args.export is not None:
        from pretrain import card

        card.export_run(args.run, args.export, args.half)


if __name__ == "__main__":
    main()
