"""Trains the embedded CLIP: `--stage views`, then `texts`, `tokens`, `train`; `--export` any time.

`views` and `texts` run the teachers once (the only stages that need PyTorch and the packages named
in pretrain/teachers.py) and leave their answers in the run folder. `train` is JAX alone; started
again it goes on from its checkpoint.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from pretrain import captions, leaks, views

EVALUATION = {"BUSI": "busi", "BrainMRI": "brain_mri", "chest_xray": "chest_xray"}
DISJOINT_PATIENTS = {"chest_xray"}
REPEATS = {"breast ultrasound": 10}  # few images: drawn more often
VOCABULARY = 6000
COMMON_WORDS = 6000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with pretrain/, terminology/ ..."
    )
    parser.add_argument("--run", type=Path, required=True, help="folder for caches and checkpoints")
    parser.add_argument("--stage", choices=("views", "texts", "tokens", "train"))
    parser.add_argument("--shards", type=int, default=60, help="shards of 512 views")
    parser.add_argument(
        "--init", type=Path, help="CLIP folder whose image tower is the starting point"
    )
    parser.add_argument("--hours", type=float, default=1.5)
    parser.add_argument(
        "--steps", type=int, help="a budget of steps in place of hours: exactly repeatable"
    )
    parser.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="PART=X",
        help="weight of a part of the loss, as alike=0",
    )
    parser.add_argument(
        "--width", type=int, default=192, help="of the image tower, a multiple of 64"
    )
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--no-findings", action="store_true", help="captions never tell disease from health"
    )
    parser.add_argument(
        "--export", type=Path, help="write the Hugging Face folder from the checkpoint"
    )
    parser.add_argument(
        "--judge", type=Path, nargs="+", help="CLIP folders to measure; results.md of the run"
    )
    parser.add_argument("--half", action="store_true", help="export float16")
    return parser.parse_args()


def checked_rows(data: Path, run: Path) -> list[views.Row]:
    """Training rows that are in no evaluation set; the counts are left for the card."""
    rows = views.read_rows(data / "pretrain")
    files = [data / "pretrain" / "images" / row.image for row in rows]
    sets = {name: data / folder for name, folder in EVALUATION.items()}
    keep, counts = leaks.leak_check(files, sets, DISJOINT_PATIENTS)
    told = {"training_images": int(keep.sum()), "sets": [c._asdict() for c in counts]}
    run.mkdir(parents=True, exist_ok=True)
    (run / "leaks.json").write_text(json.dumps(told, indent=1))
    return [row for row, kept in zip(rows, keep, strict=True) if kept]


def all_phrases(data: Path, rows: list[views.Row], seed: int, findings: bool) -> list[str]:
    """Phrases for the text teacher: image captions in their wordings, and the medical corpus."""
    rng = np.random.default_rng([seed, 17])
    said = {captions.make_caption(r, rng, findings).text for r in rows}
    return sorted(said | set(captions.phrase_corpus(data / "terminology", seed, findings)))


def make_texts(data: Path, run: Path, rows: list[views.Row], seed: int, findings: bool) -> None:
    """phrases.json, its embeddings, and common English words from the text teacher's vocabulary."""
    from pretrain import teachers

    phrases = all_phrases(data, rows, seed, findings)
    np.save(run / "meaning.npy", teachers.phrase_embeddings(phrases))
    (run / "phrases.json").write_text(json.dumps(phrases))
    (run / "words.json").write_text(json.dumps(teachers.common_words(COMMON_WORDS)))


def make_tokens(data: Path, run: Path) -> None:
    """The byte-pair vocabulary; frequent words count more so that they become single tokens."""
    from pretrain import tokens

    phrases = json.loads((run / "phrases.json").read_text())
    words = json.loads((run / "words.json").read_text())
    weighted = [w for place, w in enumerate(words) for _ in range(2 + 30 // (1 + place // 500))]
    size = tokens.write_tokenizer(run / "tokenizer", phrases * 3 + weighted, VOCABULARY)
    print(f"{size} entries")


def starting_point(init: Path | None, vocabulary: int, seed: int, width: int = 192):
    """Random parameters, the image tower replaced by that of `init` if given."""
    from pretrain import export, tower

    size = tower.Size(width=width, heads=width // 64, vocabulary=vocabulary)
    clip = tower.init(size, seed)
    if init is not None:
        theirs, _ = export.read_folder(init)
        taken = {n: v for n, v in theirs.items() if n.startswith("vision_model.")}
        wrong = [n for n, v in taken.items() if n not in clip or clip[n].shape != v.shape]
        if wrong:
            raise SystemExit(
                f"{init}: {wrong[0]} does not fit this shape; use a 192x8 image tower."
            )
        clip |= taken
    return clip, size


def weights_of(given: list[str]):
    """objective.Weights with `PART=X` replaced. Ends with a sentence if a part is unknown."""
    from pretrain import objective

    weights = objective.Weights()
    for one in given:
        name, _, value = one.partition("=")
        if name not in weights._fields:
            raise SystemExit(f"--weight {one}: give one of {', '.join(weights._fields)}")
        weights = weights._replace(**{name: float(value)})
    return weights


def load_material(run: Path, rows: list[views.Row], shards: int):
    from pretrain import loop
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


def judge_folders(data: Path, run: Path, folders: list[Path]) -> None:
    """Each folder, and the first one's shape at random weights; results.json and results.md."""
    from pretrain import export, judge, tower

    run.mkdir(parents=True, exist_ok=True)
    tests = [judge.read_set(name, data) for name in EVALUATION]
    named = {}
    for folder in folders:
        clip, size = export.read_folder(folder)
        named[folder.name] = judge.judge(folder, clip, size, tests)
        print(judge.table({folder.name: named[folder.name]}), flush=True)
    _, size = export.read_folder(folders[0])
    named["random weights"] = judge.judge(folders[0], tower.init(size, 0), size, tests)
    (run / "results.json").write_text(json.dumps(named, indent=1))
    (run / "results.md").write_text(judge.table(named) + "\n")


def main() -> None:
    args = arguments()
    if args.stage in ("views", "texts", "train"):
        rows = checked_rows(args.data, args.run)
    if args.stage == "views":
        from pretrain import teachers

        teachers.make_shards(
            args.data / "pretrain", rows, args.run / "views", args.shards, REPEATS, args.seed
        )
    elif args.stage == "texts":
        make_texts(args.data, args.run, rows, args.seed, not args.no_findings)
    elif args.stage == "tokens":
        make_tokens(args.data, args.run)
    elif args.stage == "train":
        from pretrain import loop

        material = load_material(args.run, rows, args.shards)
        clip, size = starting_point(args.init, len(material.tokenizer), args.seed, args.width)
        plan = loop.Plan(
            hours=args.hours,
            steps=args.steps,
            rate=args.rate,
            seed=args.seed,
            findings=not args.no_findings,
            weights=weights_of(args.weight),
        )
        told = plan._asdict() | {
            "weights": plan.weights._asdict(),
            "shards": len(material.shards),
            "init": args.init and args.init.name,
        }
        (args.run / "plan.json").write_text(json.dumps(told, indent=1))
        state = loop.start(clip, size, args.seed)
        loop.run(material, size, plan, state, args.run / "checkpoint.safetensors")
    if args.judge:
        judge_folders(args.data, args.run, args.judge)
    if args.export is not None:
        from pretrain import card

        card.export_run(args.run, args.export, args.half)


if __name__ == "__main__":
    main()
