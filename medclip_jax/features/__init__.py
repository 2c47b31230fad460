"""Tokens of images: encoded once on all devices, cached on disk, read as batches in training.

Everything that learns reads from here; nothing here learns.
"""
