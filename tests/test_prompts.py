"""Prompts: filling, layout, slots, and what is refused."""

import numpy as np
import pytest

from medclip_jax import clip, prompts, weights
from medclip_jax.errors import ConfigError

BOS, EOS, DOT = 1, 9, 5


class Words:
    """A tokenizer of whole words: ids are their places in `known`."""

    known = ("pad", "bos", "normal", "sick", "liver", ".", "eos")
    pad_token_id, bos_token_id, eos_token_id = 0, 1, 6

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens

        class Out:
            input_ids = [self.known.index(w) for w in text.split()]

        return Out


@pytest.fixture(scope="module")
def tokenizer():
    return clip._tokenizer(weights.EMBEDDED)


def build(tokenizer, **changed):
    given = dict(phrases="templates", anatomy="breast", conditions=("mass",), modality="ultrasound")
    given |= dict(context=4, position="end") | changed
    return prompts.build(tokenizer, tokenizer.eos_token_id, **given)


def test_fill_says_each_sentence_once():
    got = prompts.fill(
        ("no {condition}", "{modality} of {anatomy}", "word"), "liver", ("cyst", "mass"), "CT"
    )
    assert got == ["no cyst", "no mass", "CT of liver", "word"]
    assert prompts.fill(("word", "word"), "", (), "") == ["word"]
    assert prompts.fill(("no {condition}",), "liver", (), "CT") == []


@pytest.mark.parametrize(
    "position, ids, slots",
    [
        ("end", [BOS, 0, 0, 0, 7, 8, DOT, EOS], [-1, 0, 1, 2, -1, -1, -1, -1]),
        ("front", [BOS, 7, 8, 0, 0, 0, DOT, EOS], [-1, -1, -1, 0, 1, 2, -1, -1]),
        ("middle", [BOS, 0, 7, 8, 0, 0, DOT, EOS], [-1, 0, -1, -1, 1, 2, -1, -1]),
    ],
)
def test_arrange_puts_the_phrase_in_its_place(position, ids, slots):
    assert prompts.arrange(BOS, [7, 8], [DOT], EOS, 3, position) == (ids, slots)


def test_arrange_without_context_is_the_sentence():
    for position in ("end", "front", "middle"):
        got = prompts.arrange(BOS, [7, 8], [DOT], EOS, 0, position)
        assert got == ([BOS, 7, 8, DOT, EOS], [-1] * 5)


def test_tokenise_pads_and_finds_the_end_of_text():
    got = prompts.tokenise(Words(), 6, ["normal liver", "sick"], np.array([0, 1]), 2, "end")
    assert got.ids.shape == got.slots.shape == (2, 77)
    assert got.ids[0, :8].tolist() == [1, 0, 0, 2, 4, 5, 6, 0]
    assert got.ids[1, :7].tolist() == [1, 0, 0, 3, 5, 6, 0]
    assert got.slots[:, :4].tolist() == [[-1, 0, 1, -1]] * 2
    assert (got.slots[:, 3:] == -1).all() and (got.ids[:, 7:] == 0).all()
    assert got.eos.tolist() == [6, 5]
    assert got.text == ("normal liver", "sick")


def test_an_end_of_text_that_also_pads_is_found_at_its_first_place(tokenizer):
    """The embedded tokenizer, like OpenAI's, pads with the end-of-text token."""
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    got = build(tokenizer)
    for ids, eos in zip(got.ids, got.eos, strict=True):
        assert (ids[:eos] != tokenizer.eos_token_id).all()
        assert (ids[eos:] == tokenizer.eos_token_id).all()


def test_eos_id_two_means_the_largest_id():
    """transformers keeps OpenAI's first configs, which said 2, working this way."""
    ids = np.array([[49406, 2, 7, 49407, 0], [49406, 9, 49407, 0, 0]])
    assert prompts.end_of_text(ids, 2).tolist() == [3, 2]
    assert prompts.end_of_text(ids, 49407).tolist() == [3, 2]
    assert prompts.end_of_text(np.array([[5, 6, 6]]), 6).tolist() == [1]


def test_build_is_the_sentence_that_clip_reads(tokenizer):
    got = build(tokenizer, context=0)
    for row, eos, text in zip(got.ids, got.eos, got.text, strict=True):
        assert row[: eos + 1].tolist() == tokenizer(text + ".").input_ids
    healthy = [t for t, side in zip(got.text, got.label, strict=True) if side == 0]
    assert "no signs of mass" in healthy and "ultrasound of a normal breast" in healthy
    assert got.label.tolist() == sorted(got.label.tolist()) and set(got.label) == {0, 1}


@pytest.mark.parametrize("phrases, healthy, abnormal", [("templates", 6, 6), ("words", 10, 11)])
def test_each_list_has_both_classes(tokenizer, phrases, healthy, abnormal):
    got = build(tokenizer, phrases=phrases, conditions=("mass", "cyst"))
    assert len(set(got.text)) == len(got.text)
    assert (got.label == 0).sum() == healthy - (phrases == "templates")
    assert (got.label == 1).sum() == abnormal


@pytest.mark.parametrize("context", [0, 1, 8])
@pytest.mark.parametrize("position", ["end", "front", "middle"])
def test_every_row_uses_every_slot_once(tokenizer, context, position):
    got = build(tokenizer, context=context, position=position)
    for slots, eos in zip(got.slots, got.eos, strict=True):
        assert slots[slots >= 0].tolist() == list(range(context))
        assert (slots[eos:] == -1).all() and slots[0] == -1


def test_a_prompt_that_fills_all_positions_fits_and_one_more_does_not():
    words = ["liver " * 70]  # with BOS, "." and EOS: 73
    got = prompts.tokenise(Words(), 6, words, np.array([0]), 4, "middle")
    assert got.eos.tolist() == [76]
    with pytest.raises(ConfigError, match="needs 78 positions with 5 of context.*shorten"):
        prompts.tokenise(Words(), 6, words, np.array([0]), 5, "middle")


def test_unknown_choices_are_refused(tokenizer):
    with pytest.raises(
        ConfigError, match="prompts.phrases 'poems': choose one of templates, words"
    ):
        build(tokenizer, phrases="poems")
    with pytest.raises(ConfigError, match="prompts.position 'top': choose one of end, front, mid"):
        build(tokenizer, position="top")
