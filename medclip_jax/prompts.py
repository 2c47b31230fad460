"""Prompts: f_gen(anatomy, condition, modality) (equation 3), tokenised with slots for context.

Templates and word lists are data; the code only fills, tokenises and lays out.
"""

from collections.abc import Sequence

import numpy as np

from medclip_jax.errors import ConfigError
from medclip_jax.structs import Prompts

POSITIONS = 77
HEALTHY = (
    "no signs of {condition}",
    "normal {anatomy} appearance",
    "{modality} of a healthy {anatomy}",
    "{modality} of a normal {anatomy}",
)
ABNORMAL = (
    "signs of {condition}",
    "abnormal {anatomy} appearance",
    "{modality} of a diseased {anatomy}",
    "{modality} of a {anatomy} with {condition}",
)
# MediCLIP's form: bare words, 10 and 11 of them. The peer's own lists are in its repository; these
# start as they do and are ours from the fourth word on.
WORDS_HEALTHY = (
    *("normal", "healthy", "negative", "unremarkable", "clear", "asymptomatic"),
    *("typical", "regular", "undiseased", "intact"),
)
WORDS_ABNORMAL = (
    *("abnormal", "positive", "symptomatic", "diseased", "pathological", "atypical"),
    *("irregular", "unhealthy", "lesioned", "damaged", "anomalous"),
)
PHRASES = {"templates": (HEALTHY, ABNORMAL), "words": (WORDS_HEALTHY, WORDS_ABNORMAL)}


def fill(
    templates: Sequence[str], anatomy: str, conditions: Sequence[str], modality: str
) -> list[str]:
    """Every template with every condition it mentions; duplicates once, order kept."""
    filled = [
        t.format(anatomy=anatomy, condition=condition, modality=modality)
        for t in templates
        for condition in (conditions if "{condition}" in t else [""])
    ]
    return list(dict.fromkeys(filled))


def build(
    tokenizer,
    eos_id: int,
    *,
    phrases: str,
    anatomy: str,
    conditions: Sequence[str],
    modality: str,
    context: int,
    position: str,
) -> Prompts:
    """Healthy prompts first, then abnormal ones. Raises ConfigError for an unknown choice."""
    if phrases not in PHRASES:
        raise ConfigError(f"prompts.phrases {phrases!r}: choose one of {', '.join(PHRASES)}")
    healthy, abnormal = (fill(t, anatomy, conditions, modality) for t in PHRASES[phrases])
    label = np.array([0] * len(healthy) + [1] * len(abnormal))
    return tokenise(tokenizer, eos_id, [*healthy, *abnormal], label, context, position)


def tokenise(
    tokenizer,
    eos_id: int,
    phrases: Sequence[str],
    label: np.ndarray,
    context: int,
    position: str,
) -> Prompts:
    """[SOS] context phrase . [EOS] pad, the phrase at the `end`, `front` or in the `middle`.

    Raises ConfigError if a prompt does not fit in 77 positions.
    """
    if position not in ("end", "front", "middle"):
        raise ConfigError(f"prompts.position {position!r}: choose one of end, front, middle")
    names = [tokenizer(p, add_special_tokens=False).input_ids for p in phrases]
    dot = tokenizer(".", add_special_tokens=False).input_ids
    rows = [
        arrange(tokenizer.bos_token_id, name, dot, tokenizer.eos_token_id, context, position)
        for name in names
    ]
    longest = max(range(len(rows)), key=lambda i: len(rows[i][0]))
    if len(rows[longest][0]) > POSITIONS:
        raise ConfigError(
            f"prompt {phrases[longest]!r} needs {len(rows[longest][0])} positions with "
            f"{context} of context, CLIP has {POSITIONS}; shorten it or prompts.context"
        )
    ids = np.full((len(rows), POSITIONS), tokenizer.pad_token_id, np.int32)
    slots = np.full((len(rows), POSITIONS), -1, np.int32)
    for i, (row_ids, row_slots) in enumerate(rows):
        ids[i, : len(row_ids)], slots[i, : len(row_ids)] = row_ids, row_slots
    return Prompts(ids, slots, end_of_text(ids, eos_id), np.asarray(label), tuple(phrases))


def arrange(
    bos: int, name: list[int], rest: list[int], eos: int, context: int, position: str
) -> tuple[list[int], list[int]]:
    """One row: token ids and, beside them, the context vector that stands there (-1: the token)."""
    before = {"end": context, "front": 0, "middle": context // 2}[position]
    slots = list(range(context))
    ids = [bos, *[0] * before, *name, *[0] * (context - before), *rest, eos]
    where = [-1, *slots[:before], *[-1] * len(name), *slots[before:], *[-1] * (len(rest) + 1)]
    return ids, where


def end_of_text(ids: np.ndarray, eos_id: int) -> np.ndarray:
    """Where transformers reads the text feature: the first EOS, or the largest id if EOS is 2."""
    return ids.argmax(-1) if eos_id == 2 else (ids == eos_id).argmax(-1)
