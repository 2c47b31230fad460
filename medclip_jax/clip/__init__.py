"""Frozen CLIP encoders as Flax modules over transformers' parameter tree, and their checkpoints.

Every image encoder gives the same features and every text encoder takes learnable context, so
nothing outside this package asks which one it has.
"""
