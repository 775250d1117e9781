"""The plan of a study: budgets, the rows of its tables, and which rows each target of `reproduce` measures.

Budgets and rows are read from budgets.yaml and rows.yaml beside the recipes of a scale, `mini` or `sd3`. Both files are
fixed before the first comparison. A row is a chain of recipes, each with its share of the budget's steps; the budget
sets what is equal for all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import Field, ValidationError

from refine_control.config import Precision, Recipe, SamplerConfig, Section, Seed
from refine_control.errors import InvalidInputError
from refine_control.injection import Injection
from refine_control.recipe_files import RECIPES, load_recipe
from refine_control.strict_yaml import read_yaml

Scale = Literal["mini", "sd3"]
TEACHER, BASELINE = "teacher", "fc"
"""Keys of the two rows that a share of the gap is measured between."""
TABLES, ALIKE = "tables", "alike"
"""What a row is measured for: the tables, or Figure 2."""
FIGURE2, FIGURE3 = "figure2", "figure3"


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
        """True if the budget sets the number and the seeds of rendered scenes."""
        return None not in (self.labeled, self.unlabeled, self.test, self.alike, self.data_seed, self.test_seed)


class RowData(Section):
    """Training data of a row, where they are not the whole data of the budget (`study.variants`)."""

    labeled: float = Field(default=1.0, gt=0, le=1, description="share of D_sl, its first samples")
    unlabeled: float = Field(default=1.0, gt=0, le=1, description="share of D_ssl, its first samples")
    prompts: Literal["given", "template", "shuffled", "global"] = Field(
        default="given", description="words of D_ssl: its own, `a SHAPE`, those of other samples, of whole pictures"
    )
    blurred: bool = Field(default=False, description="the pictures of D_ssl out of focus")
    pairs: float = Field(default=1.0, gt=0, le=1, description="share of those samples that teach few steps")


class Sampling(NamedTuple):
    """How a row of a study of steps is sampled."""

    steps: int
    guided: bool
    """At the budget's guidance; else without."""
    stock: bool = False
    """Noise levels as the scheduler spaces them; else even ones."""
    stochastic: bool = False

    def __str__(self) -> str:
        return f"{self.steps}{'g' * self.guided}{'s' * self.stock}{'n' * self.stochastic}"

    @classmethod
    def parse(cls, text: str) -> Sampling:
        """Reads `4`, or with letters: `20g` guided, `4s` in stock's spacing, `4n` with fresh noise."""
        return cls(int(text.rstrip("gsn")), "g" in text, "s" in text, "n" in text)

    def apply(self, sampler: SamplerConfig) -> SamplerConfig:
        """The sampler with these steps, guidance and noise levels."""
        return sampler.model_copy(
            update={
                "num_inference_steps": self.steps,
                "guidance_scale": sampler.guidance_scale if self.guided else 1.0,
                "sigmas": "scheduler" if self.stock else "even",
                "stochastic": self.stochastic,
            }
        )

    def describe(self) -> str:
        """`4 steps, guided`."""
        words = [f"{self.steps} step{'s' * (self.steps > 1)}", "guided" * self.guided]
        words += ["stock's spacing" * self.stock, "fresh noise" * self.stochastic]
        return ", ".join(filter(None, words))


class Row(Section):
    """A row of a table. Without stages it is the teacher itself."""

    title: str = Field(min_length=1, description="its name in tables")
    tables: list[int] = Field(default=[], description="the paper's tables that hold the row")
    studies: list[str] = Field(default=[], description="the ablations that hold the row")
    stages: dict[str, float] = Field(
        default_factory=dict, description="recipes in their order, with their shares of the steps"
    )
    settings: dict[str, str | float | int] = Field(
        default_factory=dict, description="section.key of every stage's recipe, and its value in this row"
    )
    data: RowData = Field(default_factory=RowData, description="which of the data the row is trained on")
    reference: bool = Field(default=False, description="the anchor row, which the others are compared with")
    baseline: str | None = Field(
        default=None, min_length=1, description="a model of another kind in its place: dreamshaper8, sd2 or flux"
    )
    controlnet: str | None = Field(
        default=None, min_length=1, description="a ready student in place of training: edge, the shipped one"
    )
    seeds: int | None = Field(default=None, ge=1, description="at most so many training seeds; null is the budget's")
    injection: Injection = Field(default="exact", description="of the evaluation")
    samplings: list[Annotated[str, Field(pattern=r"^[1-9]\d*g?s?n?$")]] = Field(
        default=[],
        description="ways to sample what was trained, each a row KEY@WAY of its own: 4, 20g (guided), 4s (spaced as "
        "the scheduler does), 4n (fresh noise)",
    )
    sampling: Sampling | None = Field(default=None, exclude=True, description="of a row KEY@WAY")
    paper: dict[str, float] | None = Field(default=None, description="the paper's numbers")

    def ways(self, key: str) -> dict[str, Row]:
        """The rows that are measured, by key: the row itself, or one for each of its `samplings`."""
        if not self.samplings:
            return {key: self}
        out = {}
        for text in self.samplings:
            way = Sampling.parse(text)
            title = f"{self.title}, {way.describe()}"
            out[f"{key}@{text}"] = self.model_copy(update={"sampling": way, "samplings": [], "title": title})
        return out


_Kind = TypeVar("_Kind", bound=Section)


@cache  # the files are packaged; one takes a fifth of a second to parse
def _read(path: Path, kind: type[_Kind]) -> dict[str, _Kind]:
    try:
        return {name: kind.model_validate(values) for name, values in read_yaml(path).items()}
    except ValidationError as error:
        raise InvalidInputError(f"{path}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from None


def read_budget(name: str, steps: int | None = None, scale: Scale = "mini") -> Budget:
    """A budget of a scale's budgets.yaml, with other `steps` if given. Raises InvalidInputError for another name."""
    budgets = _read(RECIPES / scale / "budgets.yaml", Budget)
    if name not in budgets:
        raise InvalidInputError(f"there is no budget {name}; budgets.yaml has {', '.join(budgets)}")
    return budgets[name] if steps is None else budgets[name].model_copy(update={"steps": steps})


def read_rows(scale: Scale = "mini") -> dict[str, Row]:
    """The rows of a scale by key, in the order of the tables."""
    rows = _read(RECIPES / scale / "rows.yaml", Row)
    return {name: each for key, row in rows.items() for name, each in row.ways(key).items()}


def trained_key(key: str) -> str:
    """The row whose training a row KEY@WAY measures."""
    return key.partition("@")[0]


def stage_steps(row: Row, steps: int) -> dict[str, int]:
    """Updates of each stage: the shares of `steps`, at least one each; the last stage takes the remainder.

    The shares of a row that is compared at equal network calls, in place of steps, add up to more or less than 1."""
    names, spent, total = list(row.stages), 0, round(steps * sum(row.stages.values()))
    out = {}
    for name in names:
        out[name] = total - spent if name == names[-1] else max(1, int(steps * row.stages[name]))
        spent += out[name]
    return out


def row_recipes(row: Row, budget: Budget, seed: int) -> dict[str, Recipe]:
    """The recipes of a row at a budget, by recipe name. The caller sets `init_from` of later stages."""
    common: dict[str, object] = {
        "training.batch_size": budget.batch_size,
        "training.precision": budget.precision,
        "training.seed": seed,
    }
    few_step = [name for name in row.stages if load_recipe(name).objective.is_few_step]

    def settings(name: str, steps: int) -> list[str]:
        """Settings of the objective are those of the stage for few steps, where there is one."""
        of_row = {k: v for k, v in row.settings.items() if not (few_step and k.startswith("objective."))}
        of_row = row.settings if name in few_step else of_row
        return [f"training.steps={steps}", *(f"{key}={value}" for key, value in {**common, **of_row}.items())]

    return {name: load_recipe(name, settings(name, steps)) for name, steps in stage_steps(row, budget.steps).items()}


def row_seeds(row: Row, seeds: Sequence[int]) -> Sequence[int]:
    """The training seeds that a row is run for: at most `row.seeds`; one if nothing is trained."""
    return seeds[: row.seeds] if row.stages else seeds[:1]


class Target(NamedTuple):
    """What one call of `reproduce` measures: rows for tables (by `tables` and `studies`) and for a figure."""

    title: str
    tables: tuple[int, ...] = ()
    studies: tuple[str, ...] = ()
    figure: str = ""
    """FIGURE2 or FIGURE3, whose rows are those of the study of this name."""
    against: str = ""
    """The anchor row of its tables; empty for that of the scale."""
    budget: str = "tables"
    """Of rendered scenes, where nobody names one."""
    baseline: bool = True
    """Whether Student_fc stands in its tables, for shares of the gap."""


TARGETS = {
    "table1": Target("Table 1", tables=(1,)),
    "table2": Target("Table 2", tables=(2,)),
    "table3": Target("Table 3", tables=(3,)),
    FIGURE2: Target("Figure 2", figure=FIGURE2),
    FIGURE3: Target("Figure 3", figure=FIGURE3),
    "layers": Target("Students of 2 to 23 layers", studies=("layers",)),
    "split": Target("Steps of stage 1 against stage 2", studies=("split",)),
    "init": Target("Where the student starts", studies=("init",)),
    "losses": Target("Weights of the terms", studies=("losses",)),
    "data": Target("How much of the data, and how good", studies=("data",)),
    "prompts": Target("Prompts of stage 2", studies=("prompts",)),
    "scarce": Target("Table 3 with ten labelled scenes", studies=("scarce",), against="labeled_1"),
    "parts": Target("Table 3 of the balanced recipe", studies=("parts",), against="balanced"),
    "steps": Target("Few steps", studies=("steps",), against="edge@4", budget="steps", baseline=False),
    "codi": Target("Ablation of CoDi", studies=("codi",), against="codi@4", budget="steps", baseline=False),
    "pairs": Target("Pairs for few steps", studies=("pairs",), against="edge@4", budget="steps", baseline=False),
    "orders": Target("Stages before few steps", studies=("orders",), against="edge@4", budget="steps", baseline=False),
    "placement": Target(
        "Which layers feed which sites", studies=("placement",), against="edge@4", budget="steps", baseline=False
    ),
    "conditions": Target("Other conditions", studies=("conditions",), against="balanced", budget="conditions"),
    "all": Target("Tables 1 and 3, Figure 2", tables=(1, 3), figure=FIGURE2),
}
"""By the word of the command line."""


def anchor_row(target: Target, named: Sequence[str] = (), against: str | None = None, scale: Scale = "mini") -> str:
    """The row that a target's tables compare the others with: `against`, else the target's, else the scale's.

    The teacher if no row of `named` is trained."""
    if against:
        return against
    rows = read_rows(scale)
    if _untrained(named, rows):
        return TEACHER
    return target.against or next(key for key, row in rows.items() if row.reference)


def _untrained(named: Sequence[str], rows: Mapping[str, Row]) -> bool:
    return bool(named) and not any(row.stages for key, row in rows.items() if {key, trained_key(key)} & set(named))


def select_rows(
    target: Target, named: Sequence[str] = (), against: str | None = None, scale: Scale = "mini"
) -> dict[str, Row]:
    """The rows of a target's tables, or those of `named`, with the teacher and the anchor row; with fc too unless no
    row of `named` is trained.

    Raises InvalidInputError for a row that does not exist, and for a target that the scale has no rows of."""
    rows = read_rows(scale)
    for study in target.studies:
        if not any(study in row.studies for row in rows.values()):
            raise InvalidInputError(f"there are no rows of {study} at the scale {scale}; write them into its rows.yaml")
    anchor = anchor_row(target, named, against, scale)
    keys = dict.fromkeys([*map(trained_key, rows), *rows])
    unknown = sorted({*named, anchor} - set(keys))
    if unknown:
        raise InvalidInputError(f"there is no row {unknown[0]}; the rows are {', '.join(keys)}")
    chosen = {TEACHER, anchor, *named} | ({BASELINE} if target.baseline and not _untrained(named, rows) else set())
    return {
        key: row
        for key, row in rows.items()
        if {key, trained_key(key)} & chosen or (not named and _belongs(row, target))
    }


def _belongs(row: Row, target: Target) -> bool:
    return bool(set(row.tables) & set(target.tables) or set(row.studies) & set(target.studies))


def measured_rows(
    measured: str, target: Target, named: Sequence[str] = (), against: str | None = None, scale: Scale = "mini"
) -> Mapping[str, Row]:
    """The rows that a target measures for its tables (TABLES) or for Figure 2 (ALIKE), and those of Figure 3."""
    if measured == TABLES:
        return select_rows(target, named, against, scale) if target.tables or target.studies else {}
    if target.figure != {ALIKE: FIGURE2, FIGURE3: FIGURE3}[measured]:
        return {}
    shown = select_rows(Target(target.title, studies=(target.figure,)), named, against, scale)
    return {key: row for key, row in shown.items() if not row.baseline}
