"""Rooms of `pretrain_compact_clip.py`: data, teachers, tower, objective, loop, export, judge."""
