"""Gentle views of one healthy image: what stands in for held-out images when there is only one.

A flip and crops of nine tenths. They show how much a score moves when nothing is wrong, but they
are the same patient and the same scan: no false-alarm rate can be promised from them.
"""

import numpy as np
from jaxtyping import Float
from scipy import ndimage

SHARE = 0.9  # of the side that a crop keeps
COUNT = 10


def of(image: Float[np.ndarray, "s s"]) -> Float[np.ndarray, "v s s"]:
    """Five crops (corners and middle), each as it is and mirrored; bilinear, [0, 1] kept."""
    size = image.shape[0]
    room = (1 - SHARE) * (size - 1)
    starts = ((0, 0), (0, room), (room, 0), (room, room), (room / 2, room / 2))
    crops = [
        ndimage.affine_transform(image, (SHARE, SHARE), start, order=1, mode="nearest")
        for start in starts
    ]
    return np.stack([*crops, *(crop[:, ::-1] for crop in crops)]).astype(np.float32)
