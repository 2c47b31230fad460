"""Pre-training of the embedded CLIP at a tiny size: loop, checkpoints, card, export, judge."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pretrain_compact_clip
import pytest
from pretrain import card, encoders, export, judge, leaks, loop, tokens
from transformers import CLIPTokenizerFast

from medclip_jax.clip import checkpoint
from medclip_jax.data import phantom
from tests.support.checkpoints import Theirs
from tests.support.paths import ROOT


def test_the_last_steps_of_the_decay_see_all_patches(monkeypatch, material):
    monkeypatch.setattr(loop, "WHOLE", 2)
    plan = loop.Plan(steps=7, decay=4, batch=4, patches=12)
    split = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    made = list(loop.batches(material, plan, 2, split))
    assert [b.keep.shape[1] for b in made] == [12, 12, 12, 196, 196]
    assert [b.coarse.shape[1] for b in made] == [12, 12, 12, 196, 196]


def test_rate_is_constant_between_warm_up_and_decay():
    """Any stop will do: nothing but the warm-up depends on how long the run is."""
    plan = loop.Plan(steps=2000, rate=1.0)
    assert loop.rate_at(plan, 0) == pytest.approx(1 / loop.WARM_UP)
    assert [loop.rate_at(plan, n) for n in (500, 1999)] == [1, 1]
    plan = plan._replace(decay=100)
    assert loop.rate_at(plan, 1899) == 1
    assert loop.rate_at(plan, 1950) == pytest.approx(0.5)
    assert loop.rate_at(plan, 1999) == pytest.approx(0.01)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_and_loads_elsewhere(
    tmp_path, monkeypatch, material, config, model, tokenizer_folder
):
    plan = loop.Plan(steps=6, batch=8, patches=12, rate=0.1, save_minutes=0.0)
    monkeypatch.setattr(loop, "LOGGED", 1)
    begin = loop.start(encoders.init(model, 0), model, 0)
    whole = loop.run(material, model, plan, begin, tmp_path / "whole.safetensors")
    lines = [json.loads(s) for s in (tmp_path / "log.jsonl").read_text().splitlines()]
    totals = [line["total"] for line in lines]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert np.mean(totals[-2:]) < np.mean(totals[:2])
    assert all(0 <= line["waiting"] <= 1 for line in lines)

    def interrupted(material, plan, number, kept):
        if number == 2:
            raise KeyboardInterrupt
        return make_batch(material, plan, number, kept)

    make_batch, path = loop.make_batch, tmp_path / "parts.safetensors"
    monkeypatch.setattr(loop, "make_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.run(material, model, plan, begin, path)
    monkeypatch.setattr(loop, "make_batch", make_batch)
    assert loop.restore(path, begin)[1].steps == 2
    path.write_bytes(path.read_bytes()[:1000])  # broken: the one before it is taken
    assert loop.restore(path, begin)[1].steps == 1
    resumed = loop.run(material, model, plan, begin, path)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    export.write_folder(tmp_path / "out", whole.params["clip"], config, tokenizer_folder, "# card")
    check_export(tmp_path / "out", jax.tree.map(np.asarray, whole.params["clip"]), model, material)


@pytest.mark.slow
def test_the_decayed_weights_are_exported_and_the_card_says_so(tmp_path, tokenizer_folder):
    entries = len(CLIPTokenizerFast.from_pretrained(tokenizer_folder))
    shape = encoders.make_config(entries, width=64, layers=2, heads=1)
    model = encoders.build(shape)
    state = loop.start(encoders.init(model, 0), model, 0)
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    plan = {"width": 64, "layers": 2, "findings": True, "init": None, "seed": 0, "shards": 3}
    plan |= {"batch": 8, "phases": [[0, "Muon"]]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    counts = leaks.LeakCount("busi", 780, 10, 0.9, 2, 0.5)._asdict()
    sources = [["BRISC", "brain mri", "CC BY 4.0", 5]]
    (tmp_path / "leaks.json").write_text(json.dumps({"sources": sources, "sets": [counts]}))
    about = {"from": 10, "steps": 20, "batch": 16, "weights": {"fine": 0.0, "patch_caption": 0.5}}
    last = state._replace(params={**state.params, "clip": encoders.init(model, 1)})
    for name, done in (("checkpoint", 10), ("decayed", 30)):
        loop.save(tmp_path / f"{name}.safetensors", last, loop.Done(done, 60.0))
        if name == "decayed":
            (tmp_path / "decay.json").write_text(json.dumps(about))
        card.export_run(tmp_path, tmp_path / name, half=False)
        clip = checkpoint.load(str(tmp_path / name))
        wanted = last.params["clip"]
        for a, b in zip(jax.tree.leaves(clip.params), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(np.asarray(a), b)
        text = (tmp_path / name / "README.md").read_text()
        views = {"checkpoint": 10 * 8, "decayed": 10 * 8 + 20 * 16}[name]
        assert f"{done} steps, {views} image views, 1 minutes" in text
        fell = (
            "the last 20 steps: the rate falls to 0; batch 16; the last 20 see all patches" in text
        )
        assert fell == (name == "decayed")
        assert "| BRISC | brain mri | CC BY 4.0 | 5 |" in text
        assert "| busi | 780 | 10 | 0.900 | 2 | 0.500 |" in text


def check_export(folder, params, model, material):
    """The exported folder in the package and in transformers is the model that was trained."""
    clip = checkpoint.load(str(folder))
    for a, b in zip(jax.tree.leaves(clip.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)
    pixels = material.shards[0].pixels[:2]
    grey = jnp.asarray(pixels, jnp.float32) / 255
    images = checkpoint.normalise(grey, clip.mean, clip.std).transpose(0, 3, 1, 2)
    ids = tokens.encode(material.tokenizer, ["a healthy brain", "no signs of glioma"], 77)
    with jax.numpy_rank_promotion("allow"):
        flax_clip = Theirs.from_pretrained(folder)
        seen, read = jax.jit(
            lambda p: (
                flax_clip.get_image_features(images, params=p),
                flax_clip.get_text_features(ids, params=p),
            )
        )(flax_clip.params)
    last = jax.jit(lambda x: encoders.encode_image(params, model, x)[1])(grey)
    ours = encoders.project(params, model, last)[:, 0]
    np.testing.assert_allclose(ours, seen, atol=1e-4)
    ours = encoders.encode_text(params, model, jnp.asarray(ids))
    np.testing.assert_allclose(ours, read, atol=1e-4)


@pytest.mark.slow
def test_folders_are_judged_by_the_packages_methods(tmp_path, config, model, tokenizer_folder):
    data = phantom.write_folder(tmp_path / "data", "ultrasound", 0, 32, 3, 1, 1)
    export.write_folder(tmp_path / "fresh", encoders.init(model, 0), config, tokenizer_folder)
    fields = [f"data.root={data}", f"cache={tmp_path}/cache"]
    configs = [ROOT / "configs" / "folder.py"]
    fields += ["steps=1", "synthesis.variants=4"]
    text = judge.judge([tmp_path / "fresh"], tmp_path / "runs", fields, configs, (2,), 1)
    head, _, row = text.splitlines()
    own = ("zero_shot", "memory", "memory, teacher", "learned", "ours")
    assert head == f"| model | set | {' | '.join(f'{v} K=2' for v in own)} |"
    assert row.startswith("| fresh | folder | ") and row.count("±") == 5
    runs = [json.loads(p.read_text()) for p in (tmp_path / "runs").rglob("config.json")]
    assert sorted(c["memory_encoder"] for c in runs) == ["", "", "", *["efficientnet-lite0"] * 2]


def test_the_plan_says_from_which_step_on_the_weights_were_others(tmp_path, monkeypatch):
    def phases(begun, *more):
        monkeypatch.setattr("sys.argv", ["x", f"--run={tmp_path}", "--stage=train", *more])
        pretrain_compact_clip.make_plan(pretrain_compact_clip.arguments(), 4, begun)
        return json.loads((tmp_path / "plan.json").read_text())["phases"]

    first = phases(0)
    assert first == phases(10, "--steps=0") and [n for n, _ in first] == [0]  # none, as documented
    later = phases(20, "--weight", "caption=0")
    assert later[0] == first[0] and later[1][0] == 20 and len(later) == 2
    assert " caption 0.1" in later[0][1] and " caption 0.1" not in later[1][1]
    assert phases(0, "--rate", "1") == [[0, first[0][1].replace("0.0008", "1")]]  # anew


def test_a_checkpoint_of_another_optimiser_is_refused(tmp_path, model):
    begin = loop.start(encoders.init(model, 0), model, 0)
    loop.save(tmp_path / "c.safetensors", begin._replace(moments=()), loop.Done(3, 1.0))
    with pytest.raises(SystemExit, match="another version of the training"):
        loop.restore(tmp_path / "c.safetensors", begin)
