"""Does the design of the prompts matter? One factor changed at a time.

The base is the default: phrase templates, 8 context vectors per prompt, the phrase at the end,
random initialisation.
"""

VARIANTS = {
    "default": {},
    "plain-words": {"prompts.phrases": "words"},
    "templates-and-ontology": {"prompts.phrases": "ontology"},
    "context-4": {"prompts.context": 4},
    "context-16": {"prompts.context": 16},
    "shared-context": {"prompts.shared": True},
    "phrase-in-front": {"prompts.position": "front"},
    "phrase-in-the-middle": {"prompts.position": "middle"},
    "from-a-photo-of-a": {"prompts.init": "a photo of a"},
    "language-adapter": {"model.language": "embedded"},
    "language-adapter-tuned": {"model.language": "embedded", "model.language_tuned": True},
}
