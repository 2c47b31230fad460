"""What turns tokens into scores: pure functions with parameters, and their calibration.

The prompts that were trained, a memory of healthy patches, plain prompts, baselines on pixels, and
their ensemble; `detector.score_batch` is the one way to calibrated scores.
"""
