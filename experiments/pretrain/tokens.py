"""A byte-pair vocabulary in CLIP's own file format, from captions, phrases and common words."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizerFast
from transformers.models.clip.tokenization_clip import bytes_to_unicode

START, END = "<|startoftext|>", "<|endoftext|>"
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train_merges(texts: Iterable[str], entries: int) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, for CLIP's splitting of lower-case text."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in merges]


def write_tokenizer(folder: Path, texts: Iterable[str], entries: int) -> int:
    """CLIP's four tokenizer files; returns the vocabulary's size. The end token's id is largest."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = train_merges(texts, entries)
    letters = list(bytes_to_unicode().values())
    names = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges] + [START, END]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    assert vocabulary[END] == len(vocabulary) - 1
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps(special | settings))
    return len(vocabulary)


def encode(tokenizer: CLIPTokenizerFast, texts: list[str], length: int) -> np.ndarray:
    """Token ids [n length] int32, padded with the end token, cut to `length`."""
    out = tokenizer(texts, padding="max_length", truncation=True, max_length=length)
    return np.asarray(out["input_ids"], np.int32)
