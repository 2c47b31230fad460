"""Methods side by side, as in the paper's Tables 1 to 4.

`ours` is the default of the package. `fomaml` is ours trained in episodes with first-order
meta-gradients, `paper` follows the paper to the letter, `mediclip` its peer. The others learn
nothing and show what a result must beat.
"""

VARIANTS = {
    "ours": {"method": "ours"},
    "fomaml": {"method": "ours", "learner": "fomaml"},
    "paper": {"method": "paper"},
    "mediclip": {"method": "mediclip"},
    "memory": {"method": "memory"},
    "zero_shot": {"method": "zero_shot"},
    "thumbnails": {"method": "thumbnails"},
    "grey_level": {"method": "grey_level"},
}
