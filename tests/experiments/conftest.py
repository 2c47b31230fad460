"""A tiny CLIP in pre-training, its tokenizer and its views."""

import numpy as np
import pytest
from pretrain import captions, encoders, loop, tokens, views
from transformers import CLIPTokenizerFast

ROWS = [
    views.Row(f"{n}.png", "made", "none", modality, "axial" if modality == "brain mri" else "",
              "abnormal" if finding else "normal", finding, "label")
    for n, (modality, finding) in enumerate(captions.CLASSES)
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = np.random.default_rng(0)
    said = [captions.make_caption(row, rng).text for row in ROWS * 60]
    tokens.write_tokenizer(folder, said, 700)
    return folder


@pytest.fixture(scope="module")
def config(tokenizer_folder):
    entries = len(CLIPTokenizerFast.from_pretrained(tokenizer_folder))
    small = {"text_width": 16, "text_layers": 1, "text_heads": 2, "joint": 16}
    return encoders.make_config(entries, width=32, layers=4, heads=2, **small)


@pytest.fixture(scope="module")
def model(config):
    return encoders.build(config)


@pytest.fixture(scope="module")
def material(tokenizer_folder):
    rng = np.random.default_rng(1)
    shard = views.Shard(
        index=np.arange(len(ROWS)),
        pixels=rng.integers(0, 255, (len(ROWS), 224, 224), dtype=np.uint8),
        fine=rng.normal(size=(len(ROWS), 14, 14, 40)).astype(np.float16),
        coarse=rng.normal(size=(len(ROWS), 14, 14, 112)).astype(np.float16),
        pooled=rng.normal(size=(len(ROWS), 1280)).astype(np.float16),
    )
    return loop.Material(
        shards=[shard],
        places=np.arange(len(ROWS)),
        rows=ROWS,
        scales=loop.channel_scales([shard]),
        tokenizer=CLIPTokenizerFast.from_pretrained(tokenizer_folder),
        phrases=["no signs of glioma", "a healthy liver"],
        meaning=np.eye(2, 384, dtype=np.float32),
    )
