"""Data sets: files, records, splits, checks, preprocessing, augmentation and simulated sets.
This package ends at the pixels of an image and of its synthetic variants."""
