"""A teacher, its student, and the same student without a teacher: accuracy against speed.

Only the learned branch is compared, which is what teaches. The teacher refines tokens of all
tapped layers; the students read the last layer of the embedded CLIP alone. The column `seconds
score` of runs.csv is the time from cached tokens to maps and scores; MC-dropout is off.
"{teacher}" stands for the teacher's folder of the same data set, K and draw.
"""

COMMON = {
    "branches": ("learned",),
    "score.passes": 1,
    "explained": 0,
    "validations": 0,
}
STUDENT = COMMON | {"clip.layers": (8,)}

VARIANTS = {
    "teacher": COMMON | {"model.refine": True},
    "student": STUDENT | {"teacher": "{teacher}"},
    "student-alone": STUDENT,
}
