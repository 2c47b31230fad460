"""What turns tokens into scores: pure functions with parameters, and their calibration.

The prompts that were trained, a memory of healthy patches, plain prompts, baselines on pixels, and
their ensemble; `detector.read_batch` and `finish` are the one way to calibrated scores.
"""
