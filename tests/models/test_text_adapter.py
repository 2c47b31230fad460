"""The language adapter: identity when fresh, its file, its training, and runs with it."""

import csv
import importlib.util
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from safetensors import safe_open

from medclip_jax import build
from medclip_jax import config as config_module
from medclip_jax.clip import checkpoint
from medclip_jax.errors import CheckpointError, ConfigError
from medclip_jax.models import model, similarity, text_adapter
from medclip_jax.prompts import ontology
from tests.support.paths import ROOT
from tests.support.predicting import run as predict
from tests.support.runs import predictions


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "pretrain_language_adapter", ROOT / "experiments" / "pretrain_language_adapter.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_adapter(width: int) -> dict:
    rng = np.random.default_rng(0)
    fresh = text_adapter.init(jax.random.key(0), width)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), fresh)


def test_a_fresh_adapter_is_the_identity_to_the_bit(key):
    x = jax.random.normal(key, (5, 16)) * 7
    fresh = text_adapter.init(key, 16)
    assert fresh["down"]["kernel"].shape == (16, 4) and np.abs(fresh["down"]["kernel"]).max() > 0.1
    np.testing.assert_array_equal(text_adapter.adapt(fresh, x), x)
    gradient = jax.grad(lambda p: text_adapter.adapt(p, x).sum())(fresh)
    assert np.abs(gradient["up"]["kernel"]).max() > 0  # and yet it learns


def test_the_change_does_not_depend_on_the_length(key):
    x, p = jax.random.normal(key, (5, 16)), random_adapter(16)
    one, ten = text_adapter.adapt(p, x), text_adapter.adapt(p, 10 * x)
    np.testing.assert_allclose(ten, 10 * one, rtol=1e-4, atol=1e-4)
    by_hand = x / np.linalg.norm(x, axis=1, keepdims=True)
    hidden = jax.nn.gelu(by_hand @ p["down"]["kernel"] + p["down"]["bias"][None])
    change = hidden @ p["up"]["kernel"] + p["up"]["bias"][None]
    length = np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(one, x + length * change, rtol=1e-4, atol=1e-4)


def test_what_is_kept_comes_back_and_only_for_its_own_clip(tmp_path):
    p, path = random_adapter(16), tmp_path / "a.safetensors"
    text_adapter.save(path, p, "f00d", {"source": "a test"})
    back = text_adapter.load(str(path), "f00d", 16)
    jax.tree.map(np.testing.assert_array_equal, back, p)
    with safe_open(path, framework="np") as held:
        assert held.metadata() == {"clip": "f00d", "source": "a test"}
    with pytest.raises(CheckpointError, match="was trained for the CLIP f00d and this is beef"):
        text_adapter.load(str(path), "beef", 16)
    with pytest.raises(CheckpointError, match="do not fit"):
        text_adapter.load(str(path), "f00d", 32)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="not a language adapter"):
        text_adapter.load(str(path), "f00d", 16)
    with pytest.raises(CheckpointError, match="cannot be read"):
        text_adapter.digest(str(tmp_path / "none"))


def test_the_shipped_adapter_is_the_embedded_clips(compact):
    adapter = text_adapter.load("embedded", compact.digest, compact.joint)
    assert np.abs(adapter["up"]["kernel"]).max() > 0
    with safe_open(text_adapter.EMBEDDED, framework="np") as held:
        before, after = held.metadata()["retrieval"].split(" before, ")
    assert float(after.removesuffix(" after")) > float(before)
    assert text_adapter.EMBEDDED.stat().st_size < 1_000_000


def test_it_follows_the_text_encoder_wherever_text_is_encoded(compact):
    """Prompts of the model and plain ones; a tuned one stands in for the frozen one."""
    c = config_module.base("")
    plain, frozen = build.model_parts(c, compact, context=0)
    c.model.language = "fresh"  # changes nothing
    _, same = build.model_parts(c, compact, context=0)
    c.model.language = "embedded"
    _, adapted = build.model_parts(c, compact, context=0)
    words = model.text_features({}, frozen, plain)
    new = model.text_features({}, adapted, plain)
    held = text_adapter.load("embedded", compact.digest, compact.joint)
    np.testing.assert_allclose(new, text_adapter.adapt(held, words), rtol=1e-4, atol=1e-4)
    assert float((similarity.unit(new) * similarity.unit(words)).sum(-1).min()) < 0.999
    fresh = text_adapter.init(jax.random.key(1), compact.joint)
    tuned = model.text_features({"language": fresh}, adapted, plain)
    np.testing.assert_array_equal(tuned, words)
    np.testing.assert_array_equal(model.text_features({}, same, plain), words)


def test_only_a_tuned_adapter_is_learned(tiny):
    c = config_module.base("", name="folder", anatomy="breast", conditions=("mass",))
    c.model.language = "fresh"
    for tuned in (False, True):
        c.model.language_tuned = tuned
        design, frozen = build.model_parts(c, tiny)
        assert ("language" in build.fresh_params(c, tiny, design)) == tuned
        assert "language" in frozen


def test_a_run_with_an_adapter_predicts_and_notices_another(world, tmp_path, capfd):
    clip = checkpoint.load(str(world.clip))
    path = tmp_path / "a.safetensors"
    text_adapter.save(path, random_adapter(clip.joint), clip.digest, {})
    flags = (f"--config.model.language={path}", "--config.model.language_tuned=True")
    flags += ("--config.steps=3", "--config.branches=('learned','zero_shot')")
    assert world.main(tmp_path / "run", *flags, report=False) == 0
    assert np.isfinite(predictions(tmp_path / "run")["maps"]).all()
    assert predict(tmp_path / "run", tmp_path / "out", world.data / "test" / "good") == 0
    with safe_open(tmp_path / "run" / "scorer.safetensors", framework="np") as file:
        moved = file.get_tensor("learned/model/language/up/kernel")
    assert not np.array_equal(moved, random_adapter(clip.joint)["up"]["kernel"])
    other = jax.tree.map(lambda x: 2 * x, random_adapter(clip.joint))
    text_adapter.save(path, other, clip.digest, {})
    assert predict(tmp_path / "run", tmp_path / "out2", world.data) == 2
    assert "another language adapter" in capfd.readouterr().err


def test_a_run_notices_another_ontology_and_another_clip(world, tmp_path, capfd):
    clip, table, run = tmp_path / "clip", tmp_path / "own.csv", tmp_path / "run"
    shutil.copytree(world.clip, clip)
    flags = (f"--config.clip.checkpoint={clip}", f"--config.prompts.ontology_file={table}")
    flags += ("--config.prompts.phrases=ontology", "--config.data.conditions=('oddity',)")
    flags += ("--config.steps=3", "--config.branches=('learned',)")

    def call(words: str, *more: str) -> int:
        table.write_text(f"kind,name,synonyms\nfinding,oddity,{words}\n")
        return world.main(run, *flags, *more, report=False)

    assert call("odd spot") == 0
    before = (run / "scorer.json").read_bytes()
    assert call("odd place", "--mode=evaluate") == 2
    assert "(config.prompts.ontology_file) or other images of" in capfd.readouterr().err
    assert predict(run, tmp_path / "out", world.data / "test" / "good") == 2
    assert "another language adapter or ontology than" in capfd.readouterr().err
    weights = clip / "flax_model.msgpack"
    tree = serialization.msgpack_restore(weights.read_bytes())
    weights.write_bytes(serialization.msgpack_serialize(jax.tree.map(lambda x: 2 * x, tree)))
    assert call("odd spot") == 2
    assert "learned with another CLIP, language adapter" in capfd.readouterr().err
    assert (run / "scorer.json").read_bytes() == before


def test_the_wrong_clip_and_nothing_to_tune_are_refused(world, tmp_path, capfd):
    embedded = "--config.model.language=embedded"
    assert world.main(tmp_path / "a", embedded, arguments="k=2") == 2
    assert "was trained for the CLIP" in capfd.readouterr().err
    assert world.main(tmp_path / "b", "--config.model.language_tuned=True") == 2
    assert "no adapter to tune" in capfd.readouterr().err
    with pytest.raises(ConfigError):
        c = config_module.base("k=2")
        c.model.language_tuned = True
        config_module.resolve(c)


# --- pre-training -----------------------------------------------------------------------------


def test_generated_sentences_say_one_thing_in_many_words(script):
    subjects = script.sentences(ontology.load())
    present, absent = subjects["finding pneumonia"]
    assert "signs of lung infection" in present and "no signs of pneumonia" in absent
    assert "chest X-ray of a lung with pneumonia" in present  # of the thorax, which contains it
    assert "mammography of a normal breast" in subjects["anatomy breast"][0]  # its own first
    assert "medical image of a normal bone" in subjects["anatomy bone"][0]  # nothing shows it
    assert not set(present) & set(absent)
    assert "the brain is unremarkable" in subjects["anatomy brain"][0]
    assert not {"finding disease", "finding no finding"} & set(subjects)
    train_side, held = script.split(subjects, 0)
    assert len(train_side) + len(held) == 2 * len(subjects) and len(held) > 20
    assert not {t for s in train_side for t in s} & set(held[0])  # a concept is on one side


@pytest.mark.parametrize("form", ["csv", "folder"])
def test_reports_are_read_in_both_forms(script, tmp_path, form):
    texts = [(f"Finding number {i}.\nIt is large.", f"Impression {i}.") for i in range(11)]
    texts.append(("No impression follows.", ""))
    if form == "csv":
        path = tmp_path / "reports.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("Id", "Findings", "IMPRESSION ")])
            csv.writer(file).writerows((i, *pair) for i, pair in enumerate(texts))
    else:
        path = tmp_path
        for i, (findings, impression) in enumerate(texts):
            said = f"IMPRESSION: {impression}\n" if impression else ""
            text = f"INDICATION: cough\nFINDINGS: {findings}\n{said}SIGNED BY: x\n"
            (path / f"{i:02}.txt").write_text(text)
    found = script.reports(path)
    assert len(found) == 11
    assert list(found.values())[3] == [["Finding number 3. It is large.", "Impression 3."]]
    with pytest.raises(SystemExit, match="need 10"):
        short = tmp_path / "short.csv"
        short.write_text("findings,impression\na,b\n")
        script.reports(short)
    with pytest.raises(SystemExit, match="cannot be read as a table .*field larger than field"):
        short.write_text('findings,impression\na,"b\n' + "a,b\n" * 40_000)
        script.reports(short)


def test_training_raises_retrieval_of_what_it_did_not_see(script, monkeypatch, tmp_path, capsys):
    """Features with a common disturbance that an adapter can learn to leave out."""
    rng = np.random.default_rng(0)
    noise = np.linalg.qr(rng.normal(size=(32, 4)))[0]
    subjects = []
    for _ in range(60):
        own = rng.normal(size=32)
        texts = own[None] + 10 * rng.normal(size=(6, 4)) @ noise.T
        subjects.append(similarity.unit(jnp.asarray(texts, jnp.float32)))
    args = type("A", (), dict(seed=0, steps=300, batch=40, rate=3e-3, temperature=0.07, keep=0.0))
    fresh = text_adapter.init(jax.random.key(0), 32)
    adapter = script.fit(fresh, subjects[:40], args)
    before, after = (script.retrieval(p, subjects[40:], 0) for p in (fresh, adapter))
    assert before < 0.5 < after, (before, after)
    args.keep = 100.0
    near = script.fit(fresh, subjects[:40], args)
    moved = [1 - script.mean_cosine(p, jnp.concatenate(subjects[40:])) for p in (near, adapter)]
    assert moved[0] < moved[1] / 3


def test_the_script_ends_with_a_file_that_loads(script, world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.safetensors"
    flags = ["--checkpoint", str(world.clip), "--steps", "2", "--batch", "8", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["pretrain", *flags])
    monkeypatch.setattr(script, "PRESENT", script.PRESENT[:2])
    monkeypatch.setattr(script, "ABSENT", script.ABSENT[:2])
    script.main()
    assert "held-out retrieval" in capsys.readouterr().out
    clip = checkpoint.load(str(world.clip))
    assert text_adapter.load(str(out), clip.digest, clip.joint)["up"]["kernel"].shape == (4, 16)


@pytest.mark.parametrize("read", [text_adapter.digest, lambda x: text_adapter.load(x, "0", 32)])
def test_a_device_or_a_huge_file_is_never_read(tmp_path, read):
    huge = tmp_path / "huge.safetensors"
    with huge.open("wb") as file:
        file.truncate(text_adapter.MOST_BYTES + 1)
    for path, reason in (("/dev/zero", "no regular file|not a regular file"), (huge, "at most")):
        with pytest.raises(CheckpointError, match=reason):
            read(str(path))
