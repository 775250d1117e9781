"""What the rows of a table are, and the budget they share: rows.yaml and budgets.yaml beside the recipes of a scale.

Both files are fixed before the first comparison. A row is a chain of recipes, each with its share of the budget's
steps; the budget sets what must be equal for all rows, whatever the recipes say. The scales are `mini` and `sd3`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from refine_control.config import Precision, Recipe, Section, Seed
from refine_control.errors import InvalidInputError
from refine_control.injection import Injection
from refine_control.recipe_files import RECIPES, load_recipe
from refine_control.strict_yaml import read_yaml

Scale = Literal["mini", "sd3"]


class Budget(Section):
    """What every row of one comparison shares."""

    labeled: int | None = Field(default=None, ge=2, description="|D_sl|; null is all that a data folder holds")
    unlabeled: int | None = Field(default=None, ge=2, description="|D_ssl|, samples without the pixels of their holes")
    test: int | None = Field(default=None, ge=2, description="test samples, the first of them")
    alike: int | None = Field(default=None, ge=1, description="scenes of each kind of Figure 2")
    data_seed: Seed | None = Field(default=None, description="seed of the training scenes")
    test_seed: Seed | None = Field(default=None, description="seed of the test scenes")
    train_seeds: list[Seed] = Field(min_length=1, description="seeds of training")
    steps: int = Field(ge=2, description="optimiser updates of every student, over all its stages")
    batch_size: int = Field(ge=1, description="samples of one update")
    precision: Precision = Field(description="arithmetic of training and evaluation")
    num_inference_steps: int = Field(ge=1, description="Euler steps of the evaluation")
    guidance_scale: float = Field(ge=0, description="guidance of the evaluation")
    conditioning_scale: float = Field(default=1.0, ge=0, le=2, description="factor on the residuals in the evaluation")

    def renders(self) -> bool:
        """Does the budget say how many scenes there are, and which?"""
        told = (self.labeled, self.unlabeled, self.test, self.alike, self.data_seed, self.test_seed)
        return None not in told


class RowData(Section):
    """What a row learns from, where that is not all of the budget's data as they are (`study.variants`)."""

    labeled: float = Field(default=1.0, gt=0, le=1, description="share of D_sl, its first samples")
    unlabeled: float = Field(default=1.0, gt=0, le=1, description="share of D_ssl, its first samples")
    prompts: Literal["given", "template", "shuffled", "global"] = Field(
        default="given", description="words of D_ssl: its own, `a SHAPE`, those of other samples, of whole pictures"
    )
    blurred: bool = Field(default=False, description="the pictures of D_ssl out of focus")


class Row(Section):
    """A row of a table. Without stages it is the teacher itself."""

    title: str = Field(min_length=1, description="how tables call it")
    tables: list[int] = Field(default=[], description="the paper's tables that hold the row")
    studies: list[str] = Field(default=[], description="the ablations that hold the row")
    stages: dict[str, float] = Field(
        default_factory=dict, description="recipes in their order, with their shares of the steps"
    )
    settings: dict[str, str | float | int] = Field(
        default_factory=dict, description="section.key of every stage's recipe, and its value in this row"
    )
    data: RowData = Field(default_factory=RowData, description="what of the data the row learns from")
    reference: bool = Field(default=False, description="the row that tables hold the others against")
    baseline: str | None = Field(
        default=None, min_length=1, description="a model of another kind in its place: dreamshaper8, sd2 or flux"
    )
    seeds: int | None = Field(default=None, ge=1, description="at most so many training seeds; null is the budget's")
    injection: Injection = Field(default="exact", description="of the evaluation")
    paper: dict[str, float] | None = Field(default=None, description="the paper's numbers")


def _read(file: str, kind: type[Section], scale: str) -> dict[str, Any]:
    path = RECIPES / scale / file
    try:
        return {name: kind.model_validate(values) for name, values in read_yaml(path).items()}
    except ValidationError as error:
        raise InvalidInputError(f"{path}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from None


def read_budget(name: str, steps: int | None = None, scale: Scale = "mini") -> Budget:
    """A row of a scale's budgets.yaml, with other `steps` where given. Raises InvalidInputError for another name."""
    budgets = _read("budgets.yaml", Budget, scale)
    if name not in budgets:
        raise InvalidInputError(f"there is no budget {name}; budgets.yaml has {', '.join(budgets)}")
    return budgets[name] if steps is None else budgets[name].model_copy(update={"steps": steps})


def read_rows(scale: Scale = "mini") -> dict[str, Row]:
    """The rows of a scale by key, in the order of the tables."""
    return _read("rows.yaml", Row, scale)


def reference_of(rows: Mapping[str, Row]) -> str:
    """The key of the row that tables hold the others against."""
    return next(key for key, row in rows.items() if row.reference)


def stage_steps(row: Row, steps: int) -> dict[str, int]:
    """Updates of each stage: the shares of `steps`, at least one each; the last stage takes what rounding leaves."""
    names, given = list(row.stages), 0
    out = {}
    for name in names:
        out[name] = steps - given if name == names[-1] else max(1, int(steps * row.stages[name]))
        given += out[name]
    return out


def row_recipes(row: Row, budget: Budget, seed: int) -> dict[str, Recipe]:
    """The recipes of a row at a budget, by recipe name.

    `init_from` of later stages is left to whoever runs them."""
    common: dict[str, object] = {
        "training.batch_size": budget.batch_size,
        "training.precision": budget.precision,
        "training.seed": seed,
    }
    common |= row.settings
    return {
        name: load_recipe(name, [f"training.steps={steps}", *(f"{key}={value}" for key, value in common.items())])
        for name, steps in stage_steps(row, budget.steps).items()
    }
