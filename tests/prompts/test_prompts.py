"""Prompts: filling, layout, slots, and what is refused."""

import jax
import numpy as np
import pytest

from medclip_jax import build as build_module
from medclip_jax import config
from medclip_jax.clip import hf_weights
from medclip_jax.clip.text import load_tokenizer
from medclip_jax.errors import ConfigError
from medclip_jax.models import model
from medclip_jax.prompts import ontology, tokenize

POSITIONS = ("end", "front", "middle")


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
    return load_tokenizer(hf_weights.EMBEDDED, "clip")


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(tokenize.logging, "warning", lambda text, *a: said.append(text % a))
    return said


def build(tokenizer, **changed):
    words = tokenize.Words(("breast",), ("mass",), ("ultrasound",))
    arguments = dict(phrases="templates", words=words, context=4, position="end") | changed
    return tokenize.build(tokenizer, tokenizer.eos_token_id, **arguments)


def test_fill_says_each_sentence_once():
    words = tokenize.Words(("liver",), ("cyst", "mass"), ("CT",))
    got = tokenize.fill(("no {condition}", "{modality} of {anatomy}", "word"), words)
    assert got == ["no cyst", "no mass", "CT of liver", "word"]
    assert tokenize.fill(("word", "word"), words) == ["word"]
    assert tokenize.fill(("no {condition}",), words._replace(conditions=())) == []


@pytest.mark.parametrize(
    "position, ids, slots",
    [
        ("end", [0, 0, 0, 7, 8], [0, 1, 2, -1, -1]),
        ("front", [7, 8, 0, 0, 0], [-1, -1, 0, 1, 2]),
        ("middle", [0, 7, 8, 0, 0], [0, -1, -1, 1, 2]),
    ],
)
def test_arrange_puts_the_phrase_in_its_place(position, ids, slots):
    assert tokenize.arrange([7, 8], 3, position) == (ids, slots)
    assert tokenize.arrange([7, 8], 0, position) == ([7, 8], [-1, -1])


def test_tokenise_pads_and_finds_the_end_of_text():
    got = tokenize.tokenise(Words(), 6, ["normal liver", "sick"], np.array([0, 1]), 2, "end")
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
    assert tokenize.end_of_text(ids, 2).tolist() == [3, 2]
    assert tokenize.end_of_text(ids, 49407).tolist() == [3, 2]
    assert tokenize.end_of_text(np.array([[5, 6, 6]]), 6).tolist() == [1]


def test_build_is_the_sentence_that_clip_reads(tokenizer):
    got = build(tokenizer, context=0)
    for row, eos, text in zip(got.ids, got.eos, got.text, strict=True):
        assert row[: eos + 1].tolist() == tokenizer(text + ".").input_ids
    healthy = [t for t, side in zip(got.text, got.label, strict=True) if side == 0]
    assert "no signs of mass" in healthy and "ultrasound of a normal breast" in healthy
    assert got.label.tolist() == sorted(got.label.tolist()) and set(got.label) == {0, 1}


@pytest.mark.parametrize("phrases, healthy, abnormal", [("templates", 6, 6), ("words", 10, 11)])
def test_each_list_has_both_classes(tokenizer, phrases, healthy, abnormal):
    words = tokenize.Words(("breast",), ("mass", "cyst"), ("ultrasound",))
    got = build(tokenizer, phrases=phrases, words=words)
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


def test_a_prompt_that_fills_all_positions_fits_and_one_more_is_shortened(warnings):
    words = ["liver " * 70, "sick"]  # with BOS, "." and EOS: 73
    got = tokenize.tokenise(Words(), 6, words, np.array([0, 1]), 4, "middle")
    assert got.eos.tolist() == [76, 7] and not warnings
    got = tokenize.tokenise(Words(), 6, words, np.array([0, 1]), 5, "middle")
    assert got.eos.tolist() == [76, 8]
    assert (got.ids[0] == 4).sum() == 69 and got.ids[0, 75:].tolist() == [5, 6]
    (warning,) = warnings
    assert "liver liver" in warning and "first 69 of 70 tokens" in warning and "sick" not in warning


def test_prompts_have_the_length_of_the_text_encoder(warnings):
    got = tokenize.tokenise(Words(), 6, ["normal liver sick"], np.array([0]), 2, "end", positions=7)
    assert got.ids.tolist() == [[1, 0, 0, 2, 4, 5, 6]] and len(warnings) == 1


def test_a_context_that_leaves_no_room_is_refused():
    tokenize.tokenise(Words(), 6, ["sick"], np.array([0]), 73, "end")
    with pytest.raises(ConfigError, match="prompts.context is 74.*77 positions, give 73 or less"):
        tokenize.tokenise(Words(), 6, ["sick"], np.array([0]), 74, "end")


def test_synonyms_make_prompts_of_both_classes(tokenizer):
    """One anatomy, condition and modality, two words of each."""
    words = tokenize.Words(("breast", "bosom"), ("mass", "lump"), ("ultrasound", "sonogram"))
    assert tokenize.fill(tokenize.HEALTHY, words) == [
        "no signs of mass",
        "no signs of lump",
        "normal breast appearance",
        "ultrasound of a healthy breast",
        "ultrasound of a normal breast",
        "normal bosom appearance",
        "ultrasound of a healthy bosom",
        "ultrasound of a normal bosom",
        "sonogram of a healthy breast",
        "sonogram of a normal breast",
    ]
    conditions = ("mass", "lesion")
    table = ontology.expand(ontology.load(), conditions, "breast", "ultrasound", 3)
    got = build(tokenizer, phrases="ontology", words=table)
    words = tokenize.Words(("breast",), conditions, ("ultrasound",))
    plain = build(tokenizer, words=words)
    assert set(plain.text) < set(got.text)
    assert "signs of breast mass" in got.text and "no signs of breast lesion" in got.text
    healthy, abnormal = (
        {t for t, y in zip(got.text, got.label, strict=True) if y == s} for s in (0, 1)
    )
    assert len(healthy) + len(abnormal) == len(got.text) and not healthy & abnormal


@pytest.mark.parametrize("init", ["random", "a photo of a"])
def test_the_phrase_stands_next_to_the_words_it_begins(tokenizer, init):
    photo = tokenizer("a photo of a", add_special_tokens=False).input_ids
    n = len(photo)
    at = {p: build(tokenizer, context=n + 2, position=p, init=init).start for p in POSITIONS}
    if init == "random":
        assert all((start == -1).all() and len(start) == n + 2 for start in at.values())
        return
    assert at["end"].tolist() == [-1, -1, *photo]
    assert at["front"].tolist() == at["middle"].tolist() == [*photo, -1, -1]


@pytest.mark.parametrize("init, context", [("a photo of a", 2), ("", 4)])
def test_a_phrase_that_cannot_fill_the_context_is_refused(tokenizer, init, context):
    with pytest.raises(ConfigError, match=f"prompts.init {init!r} has .* tokens .* {context}:"):
        build(tokenizer, context=context, init=init)


@pytest.mark.parametrize("shared", [False, True])
def test_a_context_that_starts_from_a_phrase_reads_as_that_phrase(tiny, key, shared):
    """Embeddings in the slots are the phrase typed out: the text features are equal."""
    n = len(tiny.tokenizer("a photo of a", add_special_tokens=False).input_ids)
    words = tokenize.Words(("lung",), ("mass",), ("x-ray",))
    arguments = dict(phrases="templates", words=words, position="end")
    learned = tokenize.build(
        tiny.tokenizer, tiny.eos_id, **arguments, context=n, init="a photo of a"
    )
    typed = tokenize.tokenise(
        tiny.tokenizer,
        tiny.eos_id,
        ["a photo of a " + text for text in learned.text],
        learned.label,
        0,
        "end",
    )

    def features(built, context):
        fixed = (tiny.text_encoder, tiny.size, tiny.grid, "softmax", True, True, 0.0)
        design = model.Design(built, *fixed)
        params = model.init(key, tiny, design, context, shared)
        assert ("context" in params) == (context > 0)  # no vectors: no empty array
        if context:
            assert params["context"].shape[0] == (1 if shared else len(built.ids))
        return model.text_features(params, {"text": tiny.text}, design)

    np.testing.assert_allclose(features(learned, n), features(typed, 0), atol=1e-6)


def test_slots_without_a_word_of_the_phrase_start_as_ever(tiny, key):
    arguments = dict(phrases="words", words=tokenize.Words(("",), (), ("",)), position="end")
    fixed = (tiny.text_encoder, tiny.size, tiny.grid, "softmax", True, True, 0.0)

    def context(init):
        built = tokenize.build(tiny.tokenizer, tiny.eos_id, **arguments, context=6, init=init)
        return model.init(key, tiny, model.Design(built, *fixed), 6, False)["context"]

    random, begun = context("random"), context("photo")
    n = len(tiny.tokenizer("photo", add_special_tokens=False).input_ids)
    np.testing.assert_array_equal(begun[:, :-n], random[:, :-n])
    assert (np.abs(begun[:, -n:] - random[:, -n:]) > 0).any()


def test_the_configuration_reaches_the_prompts(tiny, tmp_path):
    """A condition of the user's own table; the context starts from a phrase."""
    own = tmp_path / "own.csv"
    own.write_text("kind,name,synonyms\nfinding,blob,bright blob|round blob|dim blob\n")
    c = config.base("k=2", conditions=("blob",))
    arguments = {"phrases": "ontology", "ontology_file": str(own), "init": "photo"}
    c.prompts.update(arguments)
    design, _ = build_module.model_parts(config.resolve(c), tiny)
    assert {"signs of blob", "signs of bright blob"} < set(design.prompts.text)
    assert "signs of dim blob" not in design.prompts.text
    start = tokenize.start_ids(tiny.tokenizer, "photo", c.prompts.context, "end")
    np.testing.assert_array_equal(design.prompts.start, start)
    assert design.prompts.ids.shape[1] == tiny.positions
    params = model.init(jax.random.key(0), tiny, design, c.prompts.context, False)
    assert params["context"].shape[:2] == (len(design.prompts.ids), c.prompts.context)


def test_without_context_no_phrase_is_needed(tokenizer):
    assert build(tokenizer, context=0, init="a photo of a").start.shape == (0,)
