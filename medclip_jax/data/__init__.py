"""Data sets: their files, records and splits, checks, preprocessing, augmentation and simulated sets.
Everything up to the pixels that the image encoder reads, and the synthetic variants of a support."""
