"""What each branch of the detector and each combination of branches contributes."""

VARIANTS = {
    "default": {},
    "prompts": {"branches": ("learned",)},
    "memory": {"branches": ("memory",)},
    "plain-prompts": {"branches": ("zero_shot",)},
    "prompts-memory": {"branches": ("learned", "memory")},
    "prompts-plain-prompts": {"branches": ("learned", "zero_shot_image")},
    "memory-plain-prompts": {"branches": ("memory", "zero_shot_image")},
    "coreset-of-a-tenth": {"memory_coreset": 0.1},
}
