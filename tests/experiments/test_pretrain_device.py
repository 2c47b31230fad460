"""Pre-training on devices: packed data, the teacher, views made there."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from pretrain import captions, device, encoders, lite0, loop, views

from tests.experiments.conftest import ROWS


class Net:
    """A PyTorch net of the teacher's shape with few channels, as `lite0.convert` reads it."""

    def __init__(self):
        rng, self.tensors = np.random.default_rng(0), {}
        widths = [4, 4, 4, 4, 4, 40, 8, 8, 8, 8, 8, 112, 8, 8, 8, 8, 8]

        def conv(name, norm, out, into, side):
            self.tensors[f"{name}.weight"] = rng.normal(size=(out, into, side, side)) / into**0.5
            for part in ("weight", "bias", "running_mean", "running_var"):
                self.tensors[f"{norm}.{part}"] = rng.uniform(0.5, 1.5, out)

        conv("_conv_stem", "_bn0", 4, 3, 3)
        for n, (into, out) in enumerate(zip(widths, widths[1:], strict=False)):
            block = f"_blocks.{n}"
            if n:
                conv(f"{block}._expand_conv", f"{block}._bn0", 2 * into, into, 1)
            conv(f"{block}._depthwise_conv", f"{block}._bn1", into * (1 + (n > 0)), 1, 3)
            conv(f"{block}._project_conv", f"{block}._bn2", out, into * (1 + (n > 0)), 1)
        conv("_conv_head", "_bn1", 1280, 8, 1)

    def state_dict(self):
        return {name: Tensor(x) for name, x in self.tensors.items()}


class Tensor(np.ndarray):
    def __new__(cls, x):
        return np.asarray(x, np.float32).view(cls)

    def numpy(self):
        return np.asarray(self)


def test_teacher_folds_its_normalisation_and_pads_as_tensorflow_does():
    net = Net()
    w, x = lite0.convert(net), np.random.default_rng(1).uniform(size=(1, 8, 8, 3))
    t = net.tensors
    plain = np.zeros((4, 4, 4))  # "SAME" at stride 2: nothing before, one row and column after
    padded = np.pad(x[0], ((0, 1), (0, 1), (0, 0)))
    for i, j in np.ndindex(4, 4):
        window = padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        plain[i, j] = np.einsum("hwc,ochw->o", window, t["_conv_stem.weight"])
    scale = t["_bn0.weight"] / np.sqrt(t["_bn0.running_var"] + 1e-3)
    plain = (plain - t["_bn0.running_mean"]) * scale + t["_bn0.bias"]
    ours = jax.lax.conv_general_dilated(
        x.astype(np.float32), w["stem.kernel"], (2, 2), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(ours[0]) + w["stem.bias"], plain, atol=1e-4)


@pytest.fixture(scope="module")
def source(tmp_path_factory, material):
    folder = tmp_path_factory.mktemp("pack")
    (folder / "pretrain" / "images").mkdir(parents=True)
    for n, row in enumerate(ROWS):
        picture = np.kron(np.random.default_rng(n).integers(0, 255, (14, 14)), np.ones((16, 16)))
        picture = Image.fromarray(picture.astype(np.uint8))
        picture.save(folder / "pretrain" / "images" / row.image)
    device.pack(folder / "pretrain", ROWS, material, Net(), folder / "pack.npz")
    return device.load(folder / "pack.npz")


def test_packed_batches_are_true(source, material):
    """Captions match what they are true of."""
    make = jax.jit(device.make_batch, static_argnums=(2, 3, 4))
    key, size = jax.random.key(3), 256
    batch = make(source, key, size, 20, "float32")
    place = jax.random.choice(jax.random.split(key, 7)[0], len(ROWS), (size,), p=source.chance)
    place = np.asarray(place)
    texts = material.tokenizer.batch_decode(np.asarray(batch.captions), skip_special_tokens=True)
    true = {text: [ROWS[i].state == "normal" for i in place] for text in captions.ANY_NORMAL}
    true |= {text: [ROWS[i].state != "normal" for i in place] for text in captions.ANY_ABNORMAL}
    true |= {t: [ROWS[i].modality == "chest ct" for i in place] for t in ("chest ct", "a chest ct")}
    seen = [j for j, text in enumerate(texts) if text in true]
    assert len({texts[j] for j in seen}) > 5
    for j in seen:
        np.testing.assert_array_equal(batch.match[:, j], true[texts[j]], texts[j])
    assert (np.asarray(batch.match).diagonal() == 1).all()  # each is true of its own image
    assert np.isfinite(batch.coarse).all() and batch.fine.shape == (256, 20, 40)


def test_crop_of_a_ramp_is_within_it_and_keeps_its_direction():
    ramp = np.tile(np.arange(224, dtype=np.uint8), (224, 1))
    seen = jax.vmap(device.crop, (None, 0))(
        jnp.asarray(ramp), jax.random.split(jax.random.key(0), 32)
    )
    slope = np.asarray(seen)[:, 80:144, 80:144]
    across = np.diff(slope, axis=2).mean((1, 2)) * 255
    down = np.diff(slope, axis=1).mean((1, 2)) * 255
    length = np.hypot(across, down)
    assert ((length > 0.5) & (length < 1.3)).all()  # at most the whole, at least 40%, of its width
    angles = np.rad2deg(np.arctan2(down, across))
    assert np.abs(angles).max() <= views.TURN * 1.6 and (np.abs(angles) < 0.5).mean() > 0.3


@pytest.mark.slow
def test_training_on_devices_learns_decays_and_resumes(tmp_path, monkeypatch, source, model):
    monkeypatch.setattr(device, "CHUNK", 2)
    plan = loop.Plan(steps=0, decay=2, batch=8, patches=196, rate=0.5)
    path, begin = tmp_path / "checkpoint.safetensors", loop.start(encoders.init(model, 0), model, 0)
    for _ in range(2):  # the second goes on from the first's checkpoint, not from its decay
        device.run(source, model, plan, begin, path, 1e-9)
    lines = [json.loads(s) for s in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 4, 6]
    assert lines[1]["rate"] == 0.5 and lines[3]["total"] < lines[0]["total"]
    assert all(0 <= line["share_of_peak"] < 2 for line in lines)
    assert loop.restore(path, begin)[1].steps == 4
    assert loop.restore(tmp_path / "decayed.safetensors", begin)[1].steps == 6
