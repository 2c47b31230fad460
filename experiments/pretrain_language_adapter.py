"""Train the medical language adapter (models.text_adapter) and measure held-out retrieval.

python experiments/pretrain_language_adapter.py --out adapter.safetensors \
  [--reports reports.csv | --reports FOLDER] [--checkpoint compact] [--steps 1000] [--seed 0]

Without reports, sentences are generated: templates filled with the names and synonyms of the
ontology. Texts about one finding (present, or absent) or one anatomy (normal, or abnormal) in other
words belong together. With reports, a report's findings belong to its impression: a CSV with
columns findings and impression, or a folder of text files with both sections under their names.

The loss is contrastive, both ways, between two texts of each subject, with --keep times the
distance (1 - cosine) from CLIP's own features, so that images still fit them. A fifth
of the concepts (or reports) is held out: retrieval is the share of held-out texts whose nearest
held-out text of the other wording is their own. The text encoder is frozen and runs once.
"""

import argparse
import csv
import re
from functools import partial
from pathlib import Path

import command
import jax
import jax.numpy as jnp
import numpy as np
import optax

from medclip_jax.clip import checkpoint
from medclip_jax.models import similarity, text_adapter
from medclip_jax.prompts import ontology, tokenize

PRESENT = (
    "signs of {finding}", "{finding} is seen", "findings consistent with {finding}",
    "evidence of {finding}", "there is {finding}", "{modality} of a {anatomy} with {finding}",
    "{modality} showing {finding}", "impression: {finding}",
)  # fmt: skip
ABSENT = (
    "no signs of {finding}", "no {finding} is seen", "no findings to suggest {finding}",
    "no evidence of {finding}", "{anatomy} without {finding}",
    "{modality} of a {anatomy} without {finding}", "negative for {finding}",
    "impression: no {finding}",
)  # fmt: skip
NORMAL = (
    "normal {anatomy} appearance", "{modality} of a healthy {anatomy}",
    "{modality} of a normal {anatomy}", "the {anatomy} is unremarkable",
    "no abnormality of the {anatomy}",
)  # fmt: skip
ABNORMAL = (
    "abnormal {anatomy} appearance", "{modality} of a diseased {anatomy}",
    "{modality} of an abnormal {anatomy}", "the {anatomy} is abnormal",
    "disease of the {anatomy}",
)  # fmt: skip
GENERIC = ("disease", "no finding")  # name everything or nothing
HELD_OUT = 0.2  # share of the subjects
SECTIONS = re.compile(r"^\s*(findings|impression)\s*:", re.IGNORECASE | re.MULTILINE)

Subjects = dict[str, list[list[str]]]  # concept or report -> its subjects -> texts of each


def main() -> None:
    args = arguments()
    subjects = reports(args.reports) if args.reports else sentences(ontology.load())
    clip = checkpoint.load(args.checkpoint)
    train, held_out = (features(clip, x) for x in split(subjects, args.seed))
    fresh = text_adapter.init(jax.random.key(args.seed), clip.joint)
    before = retrieval(fresh, held_out, args.seed)
    adapter = fit(fresh, train, args)
    after = retrieval(adapter, held_out, args.seed)
    moved = np.mean([1 - mean_cosine(adapter, x) for x in held_out])
    notes = {
        "source": "reports" if args.reports else "ontology templates",
        "subjects": f"{len(train)} trained, {len(held_out)} held out",
        "retrieval": f"{before:.4f} before, {after:.4f} after",
    }
    text_adapter.save(args.out, adapter, clip.digest, notes)
    print(f"{notes['subjects']}; CLIP {clip.digest}")
    print(
        f"held-out retrieval {before:.3f} before, {after:.3f} after; chance {1 / len(held_out):.3f}"
    )
    print(f"held-out features moved by {moved:.3f} (1 - cosine)")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--reports", type=Path, help="CSV, or folder of text files")
    parser.add_argument("--checkpoint", default="compact", help="as config.clip.checkpoint")
    parser.add_argument("--steps", type=command.count, default=1000)
    parser.add_argument("--batch", type=command.count, default=128, help="subjects per step")
    parser.add_argument("--rate", type=command.positive, default=1e-3)
    parser.add_argument("--temperature", type=command.positive, default=0.07)
    parser.add_argument("--keep", type=float, default=3.0, help="weight of staying near CLIP's own")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# --- texts ------------------------------------------------------------------------------------


def sentences(table: ontology.Ontology) -> Subjects:
    """Each concept's subjects, present and absent or normal and abnormal, in all wordings."""
    subjects = {}
    for concept in table.concepts:
        if concept.kind == "modality" or concept.name in GENERIC:
            continue
        place = concept.site if concept.kind == "finding" else concept.name
        words = (concept.name, *concept.synonyms)
        finding = concept.kind == "finding"
        sides = (PRESENT, ABSENT) if finding else (NORMAL, ABNORMAL)
        subjects[f"{concept.kind} {concept.name}"] = [
            [
                template.format(
                    finding=word,
                    anatomy=(place or "body part") if finding else word,
                    modality=picture(table, place),
                )
                for template in side
                for word in words
            ]
            for side in sides
        ]
    return subjects


def picture(table: ontology.Ontology, place: str) -> str:
    """The modality that shows this anatomy, or else the nearest anatomy that contains it."""
    shown: dict[str, str] = {}
    for concept in table.concepts:
        if concept.kind == "modality" and concept.site:
            shown.setdefault(concept.site, concept.name)
    while place and place not in shown:
        place = ontology.find(table, place, "anatomy").parent
    return shown.get(place, "medical image")


def reports(path: Path) -> Subjects:
    """Findings and impression of every report that has both."""
    if path.is_dir():
        paths = sorted(path.rglob("*.txt"))
        read = {str(p): sections(p.read_text(errors="replace")) for p in paths}
    else:
        try:
            with path.open(newline="") as file:
                rows = {str(i): x for i, x in enumerate(csv.DictReader(file))}
        except (OSError, ValueError, csv.Error) as error:
            raise SystemExit(f"{path} cannot be read as a table ({error})") from None
        read = {i: {str(k).strip().lower(): v for k, v in x.items()} for i, x in rows.items()}
    parts = "findings", "impression"
    texts = {n: [" ".join((r.get(x) or "").split()) for x in parts] for n, r in read.items()}
    whole = {name: [pair] for name, pair in texts.items() if all(pair)}
    if len(whole) < 10:
        raise SystemExit(f"{path}: {len(whole)} reports with findings and impression, need 10")
    return whole


def sections(text: str) -> dict[str, str]:
    """The text under FINDINGS: and IMPRESSION:, each up to the next heading."""
    parts = SECTIONS.split(text)
    headed = zip(parts[1::2], parts[2::2], strict=True)
    return {
        name.lower(): re.split(r"^\s*[A-Z][A-Z ]+:", body, flags=re.M)[0] for name, body in headed
    }


def split(subjects: Subjects, seed: int) -> tuple[list[list[str]], list[list[str]]]:
    """Subjects to train on and those held out; a concept's subjects stay together."""
    names = sorted(subjects)
    order = np.random.default_rng(seed).permutation(len(names))
    chosen = {names[i] for i in order[: round(HELD_OUT * len(names))]}
    sides = [n for n in names if n not in chosen], [n for n in names if n in chosen]
    train, held_out = ([texts for n in side for texts in subjects[n]] for side in sides)
    return train, held_out


# --- features -----------------------------------------------------------------------------------


def features(clip: checkpoint.Clip, subjects: list[list[str]], batch: int = 64) -> list[jax.Array]:
    """Text features [texts, d] of every subject, of length 1."""
    texts = [t for subject in subjects for t in subject]
    positions = clip.positions
    ids = clip.tokenizer(
        texts, padding="max_length", truncation=True, max_length=positions, return_tensors="np"
    ).input_ids.astype(np.int32)
    eos = tokenize.end_of_text(ids, clip.eos_id)
    ids = ids[:, : int(eos.max()) + 1]
    run = jax.jit(clip.text_encoder.apply)
    empty, none = jnp.zeros((batch, 0, clip.text_width)), np.full((batch, ids.shape[1]), -1)
    batches = []
    for start in range(0, len(texts), batch):
        rows = np.arange(start, start + batch) % len(texts)  # filled up by going round
        batches.append(run({"params": clip.text}, empty, ids[rows], none, eos[rows]))
    flat = similarity.unit(jnp.concatenate(batches)[: len(texts)])
    return jnp.split(flat, np.cumsum([len(s) for s in subjects])[:-1])


def mean_cosine(adapter, x) -> float:
    """Mean cosine of features before and after adaptation."""
    return float(
        (similarity.unit(text_adapter.adapt(adapter, x)) * similarity.unit(x)).sum(-1).mean()
    )


def pairs(subjects: list[jax.Array], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two different texts of every subject, [n, d] each."""
    chosen = [rng.choice(len(x), 2, replace=False) for x in subjects]
    return tuple(
        np.stack([x[c[side]] for x, c in zip(subjects, chosen, strict=True)]) for side in (0, 1)
    )


def retrieval(adapter, subjects: list[jax.Array], seed: int, draws: int = 20) -> float:
    """Share of texts whose nearest text of the other wording is of the same subject, both ways."""
    rng, host = np.random.default_rng([seed, 1]), [np.asarray(x) for x in subjects]
    right = []
    for _ in range(draws):
        one, two = (
            similarity.unit(text_adapter.adapt(adapter, jnp.asarray(x))) for x in pairs(host, rng)
        )
        cosines = np.asarray(one @ two.T)
        own = np.arange(len(host))
        right += [(cosines.argmax(1) == own).mean(), (cosines.argmax(0) == own).mean()]
    return float(np.mean(right))


def loss(adapter, one, two, temperature: float, keep: float):
    """Contrastive between the rows of `one` and `two`, both ways, plus the distance moved."""
    new = [similarity.unit(text_adapter.adapt(adapter, x)) for x in (one, two)]
    logits = new[0] @ new[1].T / temperature
    own = jnp.arange(len(one))
    both = [optax.softmax_cross_entropy_with_integer_labels(x, own) for x in (logits, logits.T)]
    moved = [1 - (a * b).sum(-1) for a, b in zip(new, (one, two), strict=True)]
    return sum(x.mean() for x in both) / 2 + keep * sum(x.mean() for x in moved) / 2


def fit(adapter, subjects: list[jax.Array], args: argparse.Namespace):
    """Adam on `loss` over batches of subjects, two texts of each sampled in every step."""
    optimizer = optax.adam(args.rate)
    rng, host = np.random.default_rng([args.seed, 0]), [np.asarray(x) for x in subjects]

    @jax.jit
    def step(adapter, state, one, two):
        objective = partial(loss, temperature=args.temperature, keep=args.keep)
        grad = jax.grad(objective)(adapter, one, two)
        update, state = optimizer.update(grad, state)
        return optax.apply_updates(adapter, update), state

    state = optimizer.init(adapter)
    for _ in range(args.steps):
        rows = rng.permutation(len(host))[: args.batch]
        adapter, state = step(adapter, state, *pairs([host[i] for i in rows], rng))
    return adapter


if __name__ == "__main__":
    command.run(main)
