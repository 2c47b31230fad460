"""Phrases become token ids of one length, with slots for learnable context (equation 4)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Int

from medclip_jax.errors import ConfigError

POSITIONS = 77


class Prompts(NamedTuple):
    """Tokenised prompts: c phrases of t text positions, k learnable context vectors."""

    ids: Int[np.ndarray, "c t"]  # token ids; what stands under a slot is ignored
    slots: Int[np.ndarray, "c t"]  # context vector that stands here, -1 for a token
    eos: Int[np.ndarray, " c"]  # position of the end-of-text token
    label: Int[np.ndarray, " c"]  # 0 healthy, 1 abnormal
    text: tuple[str, ...]  # the phrases
    start: Int[np.ndarray, " k"] | None = None  # token each context vector starts from, -1 random


EMPTY = np.zeros((0, 1), np.int32)
NONE = Prompts(EMPTY, EMPTY, EMPTY[:, 0], EMPTY[:, 0], ())  # of an encoder of images alone


class Words(NamedTuple):
    """What fills templates: each anatomy and modality with its synonyms, and all conditions."""

    anatomy: tuple[str, ...]
    conditions: tuple[str, ...]
    modality: tuple[str, ...]


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
# Those of MediCLIP (Zhang et al. 2024, its config/*.yaml).
WORDS_HEALTHY = (
    *("normal", "healthy", "negative", "unremarkable", "clear", "asymptomatic"),
    *("normal findings", "no findings", "in good health", "no evidence of disease"),
)
WORDS_ABNORMAL = (
    *("abnormal", "positive", "symptomatic", "disease", "lesion", "pathological", "impaired"),
    *("evidence of disease", "abnormal finding", "pathological condition"),
    "pathological abnormality",
)
PHRASES = {
    "templates": (HEALTHY, ABNORMAL),
    "words": (WORDS_HEALTHY, WORDS_ABNORMAL),
    "ontology": (HEALTHY, ABNORMAL),  # with every synonym
}


def fill(templates: Sequence[str], words: Words) -> list[str]:
    """Every template with every condition it mentions; duplicates once, in order.

    Synonyms of anatomy and modality come one at a time, not in every pair.
    """
    (anatomy, *anatomies), (modality, *modalities) = words.anatomy, words.modality
    variants = [(anatomy, words.conditions, modality)]
    variants += [(synonym, (), modality) for synonym in anatomies]
    variants += [(anatomy, (), synonym) for synonym in modalities]
    filled = [
        t.format(anatomy=a, condition=condition, modality=m)
        for a, conditions, m in variants
        for t in templates
        for condition in (conditions if "{condition}" in t else [""])
    ]
    return list(dict.fromkeys(filled))


def build(
    tokenizer: Any,
    eos_id: int,
    *,
    phrases: str,
    words: Words,
    context: int,
    position: str,
    init: str = "random",
    positions: int = POSITIONS,
) -> Prompts:
    """All prompts of a data set, healthy ones first.

    Args:
      tokenizer, eos_id: of the CLIP in use (see `end_of_text`).
      phrases: key of PHRASES, whose templates `words` fill.
      context: number of learnable vectors.
      position: where the phrase stands, "end", "front" or in the "middle" of the context.
      init: "random", or a phrase whose tokens the vectors start from.
      positions: length of the text encoder.

    Raises:
      ConfigError: a context that leaves no room for a phrase.
    """
    healthy, abnormal = (fill(templates, words) for templates in PHRASES[phrases])
    label = np.array([0] * len(healthy) + [1] * len(abnormal))
    built = tokenise(tokenizer, eos_id, [*healthy, *abnormal], label, context, position, positions)
    return built._replace(start=start_ids(tokenizer, init, context, position))


def start_ids(
    tokenizer: Any, init: str, context: int, position: str
) -> Int[np.ndarray, " {context}"]:
    """The token whose embedding each context vector starts from; -1: a random one (equation 4).

    The words of a phrase such as "a photo of a" stand next to the prompt's own phrase: last before
    it at the `end`, first after or around it otherwise. Raises ConfigError if the context is short.
    """
    start = np.full(context, -1, np.int32)
    if init == "random" or not context:
        return start
    ids = tokenizer(init, add_special_tokens=False).input_ids
    if not 0 < len(ids) <= context:
        raise ConfigError(
            f"prompts.init {init!r} has {len(ids)} tokens and prompts.context is {context}: "
            "give a phrase of at least one and at most so many, or random"
        )
    start[context - len(ids) if position == "end" else 0 :][: len(ids)] = ids
    return start


def tokenise(
    tokenizer: Any,
    eos_id: int,
    phrases: Sequence[str],
    label: Int[np.ndarray, " c"],
    context: int,
    position: str,
    positions: int = POSITIONS,
) -> Prompts:
    """[SOS] context phrase . [EOS] pad, the phrase at the `end`, `front` or in the `middle`.

    A tokenizer without [SOS] or full stops (SigLIP's) leaves them out. A phrase that does not fit
    in `positions` is shortened, and a warning names it. Raises ConfigError if the context leaves no
    room for one token of a phrase.
    """
    dot = tokenizer(".", add_special_tokens=False).input_ids
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = positions - context - len(dot) - len(first) - 1
    if room < 1:
        raise ConfigError(
            f"prompts.context is {context}: the text encoder has {positions} positions, "
            f"give {positions - len(dot) - len(first) - 2} or less"
        )
    ids = np.full((len(phrases), positions), tokenizer.pad_token_id, np.int32)
    slots = np.full((len(phrases), positions), -1, np.int32)
    for i, phrase in enumerate(phrases):
        tokens = tokenizer(phrase, add_special_tokens=False).input_ids
        if len(tokens) > room:
            logging.warning(
                "prompt %r is shortened to its first %d of %d tokens: the text encoder has %d "
                "positions, %d of them context",
                *(phrase, room, len(tokens), positions, context),
            )
        body, of_body = arrange(tokens[:room], context, position)
        row = [*first, *body, *dot, tokenizer.eos_token_id]
        ids[i, : len(row)], slots[i, len(first) : len(first) + len(body)] = row, of_body
    return Prompts(ids, slots, end_of_text(ids, eos_id), np.asarray(label), tuple(phrases))


def arrange(phrase: list[int], context: int, position: str) -> tuple[list[int], list[int]]:
    """Token ids of phrase and context, and the context vector at each place (-1: the token)."""
    before = {"end": context, "front": 0, "middle": context // 2}[position]
    vectors = list(range(context))
    ids = [*[0] * before, *phrase, *[0] * (context - before)]
    return ids, [*vectors[:before], *[-1] * len(phrase), *vectors[before:]]


def end_of_text(ids: Int[np.ndarray, "c t"], eos_id: int) -> Int[np.ndarray, " c"]:
    """Where transformers reads the text feature: the first EOS, or the largest id if EOS is 2."""
    return ids.argmax(-1) if eos_id == 2 else (ids == eos_id).argmax(-1)
