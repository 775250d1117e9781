"""`refine-control push`: a student, its card, pictures and recipe as a repository of the hub, or as a local folder.

An allow-list says which files of a student leave the machine; what names places of the machine is rewritten.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from refine_control.conditions.condition import own_condition
from refine_control.config import Recipe, resolved_yaml
from refine_control.errors import InvalidInputError, MissingError, RefineControlError
from refine_control.export.card_facts import (
    KNOWN,
    Run,
    describe_data,
    public_name,
    public_recipe,
    read_evaluation,
    refuse_private,
)
from refine_control.export.model_card import model_card
from refine_control.folders import A_CONTROLNET, refuse_other_kind
from refine_control.models.card import CARD, choose_sampler, packaged, read_card
from refine_control.models.components import find_weights, read_headers, read_json
from refine_control.models.loading import CONFIG, INDEX, WEIGHTS, load_painter, stock_warning, verify_folder
from refine_control.models.own_transformer import own_folder
from refine_control.pipeline.picture_cost import picture_cost
from refine_control.storage import MANIFEST, publish_folder, read_manifest, write_atomic, write_json
from refine_control.training.run import student_folder

ALLOWED = (
    CONFIG,
    CARD,
    "diffusion_pytorch_model*.safetensors",
    "scheduler/scheduler_config.json",
    f"transformer/{CONFIG}",
    "transformer/diffusion_pytorch_model*.safetensors",
    "transformer_lora/*.safetensors",
)
"""The files of a student that may leave the machine; the README, recipe, pictures and manifest are made anew."""
_TABLES = ("pos_embed.pos_embed", "pos_embed_input.pos_embed")
"""Tensors of a ControlNet that are no parameters."""
README, RECIPE, GRID = "README.md", "recipe.yaml", "grid.png"


class Plan(NamedTuple):
    """What is or would be pushed."""

    repo_id: str
    files: dict[str, int]
    """Bytes by name."""
    card: str

    @property
    def text(self) -> str:
        """For a terminal: names, sizes and the card."""
        sizes = "\n".join(f"{size:>14,}  {name}" for name, size in self.files.items())
        return f"{self.repo_id}, {sum(self.files.values()):,} bytes:\n{sizes}\n\n{README}:\n\n{self.card}"


def check_repo_id(repo_id: str) -> None:
    """Raises InvalidInputError for what is no USER/NAME of the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HFValidationError("it has no user or organisation before a slash")
    except HFValidationError as error:
        why = " ".join(str(error).split())
        raise InvalidInputError(f"{repo_id!r} is no repository of the hub ({why}); give USER/NAME") from None


def gather(
    student: str | Path,
    repo_id: str,
    out: Path,
    headings: Mapping[str, str],
    *,
    evaluation: Path | None = None,
    data: Path | None = None,
    copy: Callable[[Path, Path], Any] = shutil.copyfile,
) -> Plan:
    """Writes the repository of a student into the folder `out`, which is published whole.

    `student` is a student's folder, its run or a packaged name, `headings` the names of the metrics, `evaluation` the
    output of `evaluate`, `data` that of `data build` or `data scenes`; `copy(source, target)` brings the weights there.
    Raises InvalidInputError for a folder that is no student and for private paths, DamagedError where a file is not
    the one that was saved, and what `read_evaluation` and `describe_data` raise."""
    check_repo_id(repo_id)
    folder, manifest = _read_student(student)
    if out.resolve() == folder.resolve():
        raise InvalidInputError(f"{out} is the student itself; choose a new folder for the output")
    run = _describe(folder, manifest, repo_id, headings, evaluation, data)
    described = {key: manifest[key] for key in ("kind", "fingerprint", "steps") if key in manifest}
    recipe = public_recipe(run.recipe) if run.recipe else None
    described |= {"recipe": recipe.model_dump(mode="json")} if recipe else {}
    card = model_card(run)
    with publish_folder(out, **described) as temporary:
        for name in sorted(manifest["files"]):
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in ALLOWED):
                _copy_public(folder / name, temporary / name, copy)
        write_atomic(temporary / README, card)
        if recipe:
            write_atomic(temporary / RECIPE, resolved_yaml(recipe))
        if run.evaluated and run.evaluated.grid:
            shutil.copyfile(run.evaluated.grid, temporary / GRID)
        for path in temporary.rglob("*"):
            if path.suffix in (".json", ".md", ".yaml"):
                refuse_private(path.name, path.read_text())
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return Plan(repo_id, {path.relative_to(out).as_posix(): path.stat().st_size for path in files}, card)


def _read_student(student: str | Path) -> tuple[Path, dict[str, Any]]:
    """A student's folder and its manifest, every file of which is verified."""
    folder = student_folder(student)
    refuse_other_kind(folder, A_CONTROLNET)
    if not (folder / CONFIG).is_file() or not (folder / MANIFEST).is_file():
        raise InvalidInputError(f"{student} is no student of refine-control; {A_CONTROLNET.advice}")
    verify_folder(folder)
    return folder, read_manifest(folder, verify=False)


def _describe(
    folder: Path,
    manifest: Mapping[str, Any],
    repo_id: str,
    headings: Mapping[str, str],
    evaluation: Path | None,
    data: Path | None,
) -> Run:
    """What the card of a student is written from."""
    config = read_json(folder / CONFIG, A_CONTROLNET.advice)
    try:
        recipe = Recipe.model_validate(manifest["recipe"]) if "recipe" in manifest else None
    except ValueError:
        raise InvalidInputError(f"{folder / MANIFEST} holds a recipe of another version of refine-control") from None
    card, weights = read_card(folder), find_weights(folder, WEIGHTS.partition(".")[0])
    ours = recipe is None and card is not None and card.license is not None  # one that is packaged
    model = public_name(recipe.model) if recipe else "mini" if ours else None
    local = packaged(model) if model else None
    local = local or (Path(recipe.model) if recipe and (Path(recipe.model) / INDEX).is_file() else None)
    of_model = read_json(local / CARD, "copy the model again") if local and (local / CARD).is_file() else {}
    index = read_json(local / INDEX, "copy the model again") if local else {}
    sampler = choose_sampler(str(local or model or "MODEL"), folder, {})
    beside, scheduler = own_folder(folder), folder / "scheduler" / "scheduler_config.json"
    blocks = KNOWN[model].num_blocks if model in KNOWN else None
    return Run(
        repo_id,
        {**config, "condition": own_condition(config)},
        sum(math.prod(header.shape) for name, header in read_headers(weights).items() if name not in _TABLES),
        sampler,
        recipe,
        manifest.get("steps"),
        card,
        model,
        headings,
        evaluated=read_evaluation(evaluation, weights[0]) if evaluation else None,
        cost=picture_cost(*load_painter("mini", folder), sampler) if model == "mini" else None,  # small enough
        data=describe_data(recipe, data) if recipe else (),
        own_transformer=beside.name if beside else None,
        scheduler=read_json(scheduler, A_CONTROLNET.advice).get("_class_name") if scheduler.is_file() else None,
        without_t5=local is not None and index.get("text_encoder_3", [None])[0] is None,
        max_sequence_length=int(of_model.get("max_sequence_length", 256)),
        warning=stock_warning(config, blocks) if blocks else "",
    )


def _copy_public(source: Path, target: Path, copy: Callable[[Path, Path], Any]) -> None:
    """Brings a file of a student there; a JSON file without the place where its network was loaded from."""
    target.parent.mkdir(exist_ok=True)
    if source.suffix != ".json":
        copy(source, target)
        return
    content = json.loads(source.read_bytes())
    if "_name_or_path" in content:
        del content["_name_or_path"]
        write_json(target, content)
    else:
        shutil.copyfile(source, target)


def plan(student: str | Path, repo_id: str, headings: Mapping[str, str], **sources: Path | None) -> Plan:
    """What `push` would send, with nothing left on the disk and nothing asked of the network. Raises as `gather`."""
    with tempfile.TemporaryDirectory() as temporary:
        return gather(student, repo_id, Path(temporary) / "repository", headings, copy=_link, **sources)


def push(
    student: str | Path,
    repo_id: str,
    headings: Mapping[str, str],
    *,
    private: bool = False,
    token_env: str | None = None,
    revision: str | None = None,
    endpoint: str | None = None,
    **sources: Path | None,
) -> str:
    """Makes or updates a repository of the hub by `gather`'s files in one commit; returns the address of the commit.

    The token is that of the environment variable `token_env`, or the one that `hf auth login` left. `revision` is a
    branch, made where there is none. Raises what `gather` raises, InvalidInputError where a repository that is to be
    private is public, MissingError (exit code 69) for a missing or refused token and where the hub does not answer."""
    from huggingface_hub import HfApi, get_token

    check_repo_id(repo_id)
    token = os.environ.get(token_env) if token_env else get_token()
    if not token:
        where = f"the environment variable {token_env} is empty" if token_env else "you are not logged in to the hub"
        raise MissingError(f"{where}; run `hf auth login`, or name a variable that holds a token with --token-env")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "repository"
        files = gather(student, repo_id, folder, headings, copy=_link, **sources).files
        api = HfApi(endpoint=endpoint, token=token)
        try:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            if private and not api.model_info(repo_id).private:
                raise InvalidInputError(f"{repo_id} is there and is public; make it private first, or choose another")
            if revision:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            message = "Upload by refine-control"
            options: dict[str, Any] = {"commit_message": message, "revision": revision, "allow_patterns": list(files)}
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options).commit_url)
        except RefineControlError:
            raise
        except Exception as error:  # the hub's errors have no common ancestor
            raise _refusal(error, repo_id, api.endpoint) from error


def _link(source: Path, target: Path) -> None:
    """Weights may hold gigabytes and are only read."""
    target.symlink_to(source.resolve())


def _refusal(error: Exception, repo_id: str, endpoint: str) -> MissingError:
    """What a failed push means, and what to do."""
    from huggingface_hub.errors import GatedRepoError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return MissingError(f"{repo_id} is gated; accept its terms at {endpoint}/{repo_id}, then push again")
    if status == 401:
        return MissingError(f"{endpoint} does not accept the token; log in again with `hf auth login`")
    if status == 403:
        return MissingError(
            f"the token may not write to {repo_id}; use one with the right to write there (`hf auth whoami` says whose "
            "it is)"
        )
    if status == 404:
        return MissingError(f"{endpoint} has no {repo_id} that the token may see; check the name and the token")
    if status is not None:
        reason = getattr(error, "server_message", None) or "no reason is given"
        return MissingError(f"{endpoint} refused the push with status {status}: {reason}; try again later")
    if type(error).__name__ == "OfflineModeIsEnabled":
        return MissingError("HF_HUB_OFFLINE forbids connections to the hub; unset it, then push again")
    reason = " ".join(str(error).split()) or "no reason is given"
    return MissingError(
        f"the push to {endpoint} failed ({type(error).__name__}: {reason[:200]}); check the network, then push again"
    )
