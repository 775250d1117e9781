"""Known failures of distilled ControlNets, detected in the numbers, with what to try against each.

A failure is reported only if the 95 % interval of its difference excludes zero. The thresholds are about the size of a
visible difference and are declared here alone. Settings that a student's recipes already have are not suggested.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from refine_control.config import Recipe
from refine_control.metrics.statistics import Interval

SEEN_DB = 1.0
"""PSNR."""
SEEN_SSIM = 0.03
SEEN_POINTS = 10.0
"""Percentage points of obedience or interference."""

Difference = Mapping[str, Interval]
"""By metric."""
OUTPUT = "the teacher's output beside the task (weights.output above 0), or "
INIT, X0, NORMALISED = "init: teacher", "x0_source: teacher in stage 2", "feature_normalisation: layer"


def _untried(recipes: Sequence[Recipe]) -> list[str]:
    """The most effective settings (docs/results.md) that some stage does not have; all of them without recipes."""
    noising_answers = [r for r in recipes if r.objective.kind in ("self_supervised", "mixed")]
    taught = [r for r in recipes if r.objective.kind != "from_scratch"]
    used = {
        INIT: all(r.student.init == "teacher" for r in recipes),
        X0: all(r.objective.x0_source == "teacher" for r in noising_answers),
        NORMALISED: all(r.objective.feature_normalisation == "layer" for r in taught),
    }
    return [choice for choice, done in used.items() if not (recipes and done)]


def signatures(name: str, teacher_minus_student: Difference, recipes: Sequence[Recipe] = ()) -> list[str]:
    """A sentence for each failure of a student, from the difference teacher - student.

    `recipes` are those of its stages, if they are known."""
    untried, objectives = _untried(recipes), [r.objective for r in recipes]
    with_output = objectives and all(o.kind != "from_scratch" and o.weights.output for o in objectives)
    lacks = {m: v.mean for m, v in teacher_minus_student.items() if v.excludes_zero and v.mean > 0}
    region, whole = lacks.get("psnr_region", 0.0), lacks.get("psnr", 0.0)
    disobeys = lacks.get("both", 0.0) > SEEN_POINTS
    out = []
    if whole > region + SEEN_DB:
        out.append(
            f"{name} is {whole:.1f} dB behind the teacher on the whole picture and {region:.1f} dB in the region: the "
            "part to keep changes. The mask weight gives that part almost no weight; try "
            f"{'' if with_output else OUTPUT}a smaller alpha."
        )
    elif region > whole + SEEN_DB:
        out.append(
            f"{name} is {region:.1f} dB behind the teacher in the region and {whole:.1f} dB on the whole picture: the "
            "masked region is hardly controlled. Try a larger alpha, a larger weights.task, or weights.output_alpha."
        )
    if disobeys:
        advice = ", ".join(["more steps", *untried])
        out.append(f"{name} obeys {lacks['both']:.0f} points less than the teacher. Try {advice}.")
    elif lacks.get("ssim", 0.0) > SEEN_SSIM:
        out.append(
            f"{name} obeys but is {lacks['ssim']:.3f} of SSIM behind the teacher: blurry or incoherent. The "
            f"features are not aligned; try {' or '.join(['more steps', *({NORMALISED} & {*untried})])}."
        )
    return out


def advised_once(sentences: Iterable[str]) -> list[str]:
    """Merges failures with the same advice into one paragraph: the failure of each model, then the advice."""
    lacking: dict[str, list[str]] = {}
    for sentence in sentences:
        failure, _, advice = sentence.partition(". ")
        lacking.setdefault(advice, []).append(failure)
    return [f"{'; '.join(failures)}. {advice}".rstrip() for advice, failures in lacking.items()]


def stage_signature(one_stage_minus_ours: Difference, recipes: Sequence[Recipe] = ()) -> list[str]:
    """A sentence if stage 1 alone (the row sl) is better than both stages, made by `recipes`, for the same steps."""
    measures = {"psnr_region": "dB", "both": "points"}
    worse = {m: v.mean for m, v in one_stage_minus_ours.items() if m in measures and v.excludes_zero and v.mean > 0}
    if not worse:
        return []
    amounts = " and ".join(f"{value:.1f} {measures[m]}" for m, value in worse.items())
    advice = " and ".join(["a longer stage 1", *({X0} & {*_untried(recipes)})])
    return [
        f"Stage 1 alone, for the same steps, is better than both stages by {amounts}: stage 2 harms the student. Try "
        f"{advice}."
    ]


def prompt_signature(name: str, global_minus_local: Difference) -> list[str]:
    """A sentence if global prompts make a model fill the hole with another object (Figure 2)."""
    confused = global_minus_local["interference"]
    if not confused.excludes_zero or confused.mean <= SEEN_POINTS:
        return []
    return [
        f"With global prompts {name} paints another object of the picture {confused.mean:.0f} points more often than "
        "with local ones: prompt it, and train it, with the content of the masked region."
    ]
