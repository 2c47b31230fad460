"""Parts of pretrain_compact_clip.py: data, teachers, encoders, objective, loop, export, judge."""
