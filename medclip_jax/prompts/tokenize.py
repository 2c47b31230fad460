"""TODO."""

from collections.abc import Sequence

import numpy as np
from absl import logging

from medclip_jax.errors import ConfigError
from medclip_jax.prompts import ontology, prompts
from medclip_jax.prompts.prompts import Prompts

POSITIONS = 77


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
    init: str = "random",
    synonyms: int = 3,
    ontology_file: str = "",
    positions: int = POSITIONS,
) -> Prompts:
    """Healthy prompts first, then abnormal ones.

    With `phrases` "ontology", at most `synonyms` words (0 = all) stand for each anatomy, condition
    and modality, from the shipped table and `ontology_file`. `positions` is the length of the text
    tower. Raises ConfigError for an unknown choice, or a word that the ontology does not know.
    """
    if phrases not in prompts.PHRASES:
        raise ConfigError(
            f"prompts.phrases {phrases!r}: choose one of {', '.join(prompts.PHRASES)}"
        )
    if phrases == "ontology":
        table = ontology.load(ontology_file)
        words = ontology.expand(table, conditions, anatomy, modality, synonyms)
        healthy, abnormal = (prompts.fill_words(t, words) for t in prompts.PHRASES[phrases])
    else:
        healthy, abnormal = (
            prompts.fill(t, anatomy, conditions, modality) for t in prompts.PHRASES[phrases]
        )
    label = np.array([0] * len(healthy) + [1] * len(abnormal))
    built = tokenise(tokenizer, eos_id, [*healthy, *abnormal], label, context, position, positions)
    return built._replace(start=start_ids(tokenizer, init, context, position))


def start_ids(tokenizer, init: str, context: int, position: str) -> np.ndarray:
    """The token whose embedding each context vector starts from; -1: a random one (equation 4).

    The words of a phrase such as "a photo of a" stand next to the prompt's own phrase: last before
    it at the `end`, first after or around it otherwise. Raises ConfigError if they are more than
    the context.
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
    tokenizer,
    eos_id: int,
    phrases: Sequence[str],
    label: np.ndarray,
    context: int,
    position: str,
    positions: int = POSITIONS,
) -> Prompts:
    """[SOS] context phrase . [EOS] pad, the phrase at the `end`, `front` or in the `middle`.

    A phrase that does not fit in `positions` is shortened, and a warning names it. Raises
    ConfigError if the context leaves no room for one token of a phrase.
    """
    if position not in ("end", "front", "middle"):
        raise ConfigError(f"prompts.position {position!r}: choose one of end, front, middle")
    names = [tokenizer(p, add_special_tokens=False).input_ids for p in phrases]
    dot = tokenizer(".", add_special_tokens=False).input_ids
    room = positions - context - len(dot) - 2
    if room < 1:
        raise ConfigError(
            f"prompts.context is {context}: the text tower has {positions} positions, "
            f"give {positions - len(dot) - 3} or less"
        )
    for phrase, name in zip(phrases, names, strict=True):
        if len(name) > room:
            logging.warning(
                "prompt %r is shortened to its first %d of %d tokens: the text tower has %d "
                "positions, %d of them context",
                phrase,
                room,
                len(name),
                positions,
                context,
            )
    rows = [
        arrange(tokenizer.bos_token_id, name[:room], dot, tokenizer.eos_token_id, context, position)
        for name in names
    ]
    ids = np.full((len(rows), positions), tokenizer.pad_token_id, np.int32)
    slots = np.full((len(rows), positions), -1, np.int32)
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
