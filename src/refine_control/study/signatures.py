"""What went wrong, read off the numbers: the failures that distilled ControlNets show, and what to try against each.

A signature is only told where its interval excludes zero. The thresholds are of the size at which people see a
difference; they are declared here and nowhere else. What the recipes of a student do already is not advised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from refine_control.config import Recipe

SEEN_DB = 1.0
"""PSNR."""
SEEN_SSIM = 0.03
SEEN_POINTS = 10.0
"""Per cent of obedience or interference."""

Difference = Mapping[str, Mapping[str, Any]]
"""By metric: mean, low, high, excludes_zero."""


OUTPUT = "the teacher's output beside the task (weights.output above 0), or "
INIT, X0, NORMALISED = "init: teacher", "x0_source: teacher in stage 2", "feature_normalisation: layer"


def _untried(recipes: Sequence[Recipe]) -> list[str]:
    """The choices that are worth most (docs/results.md) and that some stage does not make; all of them of no recipe."""
    if not recipes:
        return [INIT, X0, NORMALISED]
    taught = [r for r in recipes if r.objective.kind != "from_scratch"]
    made = {
        INIT: all(r.student.init == "teacher" for r in recipes),
        X0: all(r.objective.x0_source == "teacher" for r in recipes if _noises_answers(r)),
        NORMALISED: all(r.objective.feature_normalisation == "layer" for r in taught),
    }
    return [choice for choice, done in made.items() if not done]


def _noises_answers(recipe: Recipe) -> bool:
    return recipe.objective.kind in ("self_supervised", "mixed")


def signatures(name: str, teacher_minus_student: Difference, recipes: Sequence[Recipe] = ()) -> list[str]:
    """What a student lacks beside its teacher, by metric; one sentence for each failure that is told from zero.

    `recipes` are those of its stages, where they are known."""
    untried = _untried(recipes)
    heard = bool(recipes) and all(r.objective.kind != "from_scratch" and r.objective.weights.output for r in recipes)
    lacks = {m: v["mean"] for m, v in teacher_minus_student.items() if v["excludes_zero"] and v["mean"] > 0}
    region, whole = lacks.get("psnr_region", 0.0), lacks.get("psnr", 0.0)
    disobeys = lacks.get("both", 0.0) > SEEN_POINTS
    out = []
    if whole > region + SEEN_DB:
        out.append(
            f"{name} is {whole:.1f} dB behind the teacher on the whole picture and {region:.1f} dB in the region: what "
            "ought to be kept changes. The mask weight gives the rest of the picture next to nothing; try "
            f"{'' if heard else OUTPUT}a smaller alpha."
        )
    elif region > whole + SEEN_DB:
        out.append(
            f"{name} is {region:.1f} dB behind the teacher in the region and {whole:.1f} dB on the whole picture: the "
            "mask is hardly heeded. Try a larger alpha, a larger weights.task, or weights.output_alpha."
        )
    if disobeys:
        out.append(
            f"{name} obeys {lacks['both']:.0f} points less than the teacher. Try {', '.join(['more steps', *untried])}."
        )
    if lacks.get("ssim", 0.0) > SEEN_SSIM and not disobeys:
        out.append(
            f"{name} obeys and yet is {lacks['ssim']:.3f} of SSIM behind the teacher: blurry or incoherent. The "
            f"features are not aligned; try {' or '.join(['more steps', *({NORMALISED} & {*untried})])}."
        )
    return out


def advised_once(sentences: Iterable[str]) -> list[str]:
    """Failures with the same advice as one paragraph: what each model lacks, then the advice."""
    lacking: dict[str, list[str]] = {}
    for sentence in sentences:
        failure, _, advice = sentence.partition(". ")
        lacking.setdefault(advice, []).append(failure)
    return [f"{'; '.join(failures)}. {advice}".rstrip() for advice, failures in lacking.items()]


def stage_signature(one_stage_minus_ours: Difference, recipes: Sequence[Recipe] = ()) -> list[str]:
    """Ours, made by `recipes`, against the same steps of stage 1 alone (the row sl): did stage 2 make it worse?"""
    worse = {
        m: v["mean"]
        for m, v in one_stage_minus_ours.items()
        if m in ("psnr_region", "both") and v["excludes_zero"] and v["mean"] > 0
    }
    if not worse:
        return []
    told = " and ".join(f"{value:.1f} {'dB' if m == 'psnr_region' else 'points'}" for m, value in worse.items())
    return [
        f"Stage 1 alone, for the same steps, is better than both stages by {told}: stage 2 takes from the student. Try "
        f"{' and '.join(['a longer stage 1', *({X0} & {*_untried(recipes)})])}."
    ]


def prompt_signature(name: str, global_minus_local: Difference) -> list[str]:
    """Figure 2 of one model: does a prompt of the whole picture fill the hole with another object?"""
    confused = global_minus_local["interference"]
    if not confused["excludes_zero"] or confused["mean"] <= SEEN_POINTS:
        return []
    return [
        f"By global prompts {name} paints another object of the picture {confused['mean']:.0f} points more often than "
        "by local ones: prompt it, and train it, with what belongs in the hole."
    ]
