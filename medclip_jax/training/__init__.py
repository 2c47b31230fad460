"""Training: episodes and batches of the pool, the step, exact MAML, the loop and its checkpoints.

Everything random is a function of (seed, step), so a resumed run repeats an uninterrupted one.
"""
