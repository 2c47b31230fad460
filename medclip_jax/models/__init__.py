"""What is learned on top of the frozen CLIP: Flax modules, their losses, and anomaly from tokens.

All learned parameters are one pytree, `params`; all frozen ones are another, `frozen`.
"""
