"""Train the embedded CLIP: `--stage leaks`, `views`, `texts`, `tokens`, `train`; then `--export`.

`leaks` lists the training images that no evaluation set holds: no other is used. `views` and
`texts` run the teachers once (the only stages that need PyTorch and the packages named in
pretrain/teachers.py) and leave their answers in the run folder. `train` is JAX alone; the same
command resumes from its checkpoint. `decay` continues a copy of that checkpoint, the rate falling
to 0 and all patches in view at the end: what is exported, whenever it is wanted. `pack` and
`device` (pretrain/accelerator.sh) do the same on accelerators. `--judge` measures CLIP folders with
the package's methods.
"""

import argparse
import json
import shutil
from collections import Counter
from pathlib import Path

import command
import numpy as np
from pretrain import captions, device, encoders, leaks, loop, objective, views

from medclip_jax import files
from medclip_jax.clip import checkpoint
from medclip_jax.data import catalog

FOLDERS = {"busi": "busi/Dataset_BUSI_with_GT"}  # of evaluation sets that are not in sets/
FOLDERS |= {name: name for name in ("brain_mri", "chest_xray")}
STAGES = ("leaks", "views", "texts", "tokens", "train", "decay", "pack", "device")
VOCABULARY = 6000
COMMON_WORDS = 6000
ROOT = Path(__file__).parents[1]


def arguments() -> argparse.Namespace:
    as_it_is = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    add = parser.add_argument
    add("--data", type=Path, help="folder with pretrain/, terminology/ ...")
    add("--run", type=Path, required=True, help="folder for caches and checkpoints")
    add("--stage", choices=STAGES)
    add("--shards", type=command.count, default=60, help="shards of 512 views")
    add("--init", type=Path, help="CLIP folder whose image encoder is the starting point")
    add("--steps", type=int, default=30000, help="of train, decay, or device's decay")
    add("--minutes", type=float, default=6.0, help="of device, before the decay")
    add("--batch", type=command.count, default=64)
    add("--patches", type=command.count, default=98, help="of 196 in a step before the decay")
    add("--weight", action="append", default=[], metavar="PART=X", help="of the loss: similarity=0")
    add("--width", type=command.count, default=256, help="of the image encoder, a multiple of 64")
    add("--layers", type=command.count, default=8, help="of the image encoder")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of its products")
    add("--rate", type=command.positive, default=8e-4)
    add("--seed", type=int, default=0)
    add("--no-findings", action="store_true", help="captions never tell disease from health")
    add("--export", type=Path, help="write the Hugging Face folder from the checkpoint")
    add("--judge", type=Path, nargs="+", help="CLIP folders to measure; results.md of the run")
    add("--half", action="store_true", help="export float16")
    return parser.parse_args()


def collection(row: views.Row) -> tuple[str, str, str]:
    return row.source, row.modality, row.licence


def make_leaks(data: Path, run: Path) -> None:
    """leaks.json: names of the training images that are in no evaluation set, counts for the card.

    Raises:
      SystemExit: a collection of the training images is used for evaluation, or a set is empty.
    """
    rows = views.read_rows(data / "pretrain")
    if seen := catalog.seen_collections(row.source for row in rows):
        named = ", ".join(f"{source} ({name})" for name, source in seen.items())
        raise SystemExit(f"captions.csv: {named} is used for evaluation; take its images out")
    names = catalog.with_role("development", "report")
    sets = {name: data / FOLDERS.get(name, f"sets/{name}") for name in names}
    if empty := [x for x in sets.values() if not leaks.image_files(x)]:
        raise SystemExit(f"{empty[0]}: no image there to compare with; add the evaluation sets")
    paths = [data / "pretrain" / "images" / row.image for row in rows]
    keep, counts = leaks.leak_check(paths, sets, run / "leaks")
    rows = [row for row, kept in zip(rows, keep, strict=True) if kept]
    report = {
        "images": [row.image for row in rows],
        "sources": [[*key, n] for key, n in Counter(map(collection, rows)).items()],
        "sets": [c._asdict() for c in counts],
    }
    files.write_json(run / "leaks.json", report)


def usable(run: Path, rows: list[views.Row], shards: list[views.Shard]) -> np.ndarray:
    """Views of images that the leak check passed, numbered through the shards.

    Raises:
      SystemExit: it has not been run.
    """
    path = run / "leaks.json"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; run --stage leaks first")
    passed = set(json.loads(path.read_text())["images"])
    keep = np.array([row.image in passed for row in rows])
    return np.flatnonzero(keep[np.concatenate([shard.index for shard in shards])])


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


def starting_point(args: argparse.Namespace, vocabulary: int):
    """Encoders and random parameters, the image encoder's replaced by those of --init if given."""
    model = encoders.build(shape(args.width, args.layers, vocabulary), args.dtype)
    params = encoders.init(model, args.seed)
    if args.init is not None:
        theirs = checkpoint.load(str(args.init))
        if theirs.image_encoder.clone(levels=(), dtype=args.dtype) != model.image:
            raise SystemExit(f"{args.init}: its image encoder has another shape than asked for")
        params["vision_model"] = theirs.params["vision_model"]
    return model, params


def shape(width: int, layers: int, vocabulary: int):
    return encoders.make_config(vocabulary, width=width, layers=layers, heads=width // 64)


def weights_of(assignments: list[str]) -> objective.Weights:
    """The loss weights with `PART=X` replaced. Ends with a sentence if a part is unknown."""
    weights = objective.Weights()
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        try:
            weights = weights._replace(**{name: float(value)})
        except (TypeError, ValueError):  # no part, no number
            known = ", ".join(weights._fields)
            raise SystemExit(f"--weight {assignment}: give PART=NUMBER, of {known}") from None
    return weights


def load_material(run: Path, rows: list[views.Row], shards: int) -> loop.Material:
    from transformers import CLIPTokenizerFast

    if not (read := views.read_shards(run / "views", shards)):
        raise SystemExit(f"{run / 'views'}: no finished shard; run --stage views first")
    return loop.Material(
        shards=read,
        places=usable(run, rows, read),
        rows=rows,
        scales=loop.channel_scales(read),
        tokenizer=CLIPTokenizerFast.from_pretrained(run / "tokenizer"),
        phrases=json.loads((run / "phrases.json").read_text()),
        meaning=np.load(run / "meaning.npy"),
    )


def make_plan(args: argparse.Namespace, shards: int, begun: int) -> loop.Plan:
    """What the flags say; kept as plan.json, for the card, unless it is the decay's.

    begun: steps of the checkpoint, from which on the phase may be another.
    """
    plan = loop.Plan(
        steps=args.steps,
        batch=args.batch,
        patches=args.patches,
        rate=args.rate,
        seed=args.seed,
        findings=not args.no_findings,
        weights=weights_of(args.weight),
    )
    if args.stage != "decay":
        record = plan._asdict() | {"weights": plan.weights._asdict(), "dtype": args.dtype}
        record |= {"width": args.width, "layers": args.layers, "shards": shards}
        path, phase, phases = args.run / "plan.json", phase_of(plan), []
        if begun and path.is_file():
            phases = json.loads(path.read_text())["phases"]
        if not phases or phases[-1][1] != phase:
            phases = [*phases, [begun, phase]]
        files.write_json(path, record | {"phases": phases, "init": args.init and args.init.name})
    return plan


def phase_of(plan: loop.Plan) -> str:
    """What may differ from phase to phase of a training, as the card says it."""
    weights = plan.weights._asdict().items()
    parts = ", ".join(f"{name.replace('_', ' ')} {x:g}" for name, x in weights if x)
    how = f"rate {plan.rate:g}, batch {plan.batch}, {plan.patches} of 196 patches"
    return f"{objective.OPTIMISER}; {how}; weights: {parts}"


def train(args: argparse.Namespace, rows: list[views.Row]) -> None:
    """Train until all steps are done; plan.json says how."""
    material = load_material(args.run, rows, args.shards)
    model, params = starting_point(args, len(material.tokenizer))
    state, path = loop.start(params, model, args.seed), args.run / "checkpoint.safetensors"
    plan = make_plan(args, len(material.shards), loop.restore(path, state)[1].steps)
    if args.stage == "decay":
        plan, path = decay_plan(args.run, plan, state), args.run / "decayed.safetensors"
    loop.run(material, model, plan, state, path)


def train_on_device(args: argparse.Namespace) -> None:
    """Train on what `pack` wrote for --minutes, then --steps more while the rate falls to 0."""
    source = device.load(args.run / "pack.npz")
    model, params = starting_point(args, int(source.phrases.max()) + 1)
    state, path = loop.start(params, model, args.seed), args.run / "checkpoint.safetensors"
    plan = make_plan(args, 0, loop.restore(path, state)[1].steps)._replace(decay=args.steps)
    device.run(source, model, plan, state, path, args.minutes)


def decay_plan(run: Path, plan: loop.Plan, state: loop.State) -> loop.Plan:
    """The plan of the decay, begun with a copy of the checkpoint; the same one when resumed."""
    path, about = run / "decayed.safetensors", run / "decay.json"
    if not about.is_file():
        shutil.copyfile(run / "checkpoint.safetensors", path)
        begun = loop.restore(path, state)[1].steps
        weights = plan.weights._asdict()
        own = {"steps": plan.steps, "batch": plan.batch, "weights": weights}
        files.write_json(about, {"from": begun, **own})
    stored = json.loads(about.read_text())
    plan = plan._replace(weights=objective.Weights(**stored["weights"]))
    return plan._replace(steps=stored["from"] + stored["steps"], decay=stored["steps"])


def main() -> None:
    args = arguments()
    if args.data is None and (args.judge or args.stage not in (None, "tokens", "device")):
        raise SystemExit("--data is needed: give the folder with pretrain/, terminology/ ...")
    if args.stage == "leaks":
        make_leaks(args.data, args.run)
    elif args.stage == "tokens":
        make_tokens(args.run)
    elif args.stage == "device":
        train_on_device(args)
    elif args.stage:
        rows = views.read_rows(args.data / "pretrain")
        if args.stage == "views":
            from pretrain import teachers

            cache, data = args.run / "views", args.data / "pretrain"
            teachers.make_shards(data, rows, cache, args.shards, args.seed)
        elif args.stage == "texts":
            make_texts(args.data, args.run, rows, args.seed, not args.no_findings)
        elif args.stage == "pack":
            from pretrain import teachers

            material = load_material(args.run, rows, args.shards)
            net = teachers.load_image_teacher()
            device.pack(args.data / "pretrain", rows, material, net, args.run / "pack.npz")
        else:
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
    command.run(main)
