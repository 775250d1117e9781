"""`train` from a recipe to a student folder: once, again, by two processes, and on caches of every kind."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import SD3ControlNetModel
from safetensors.torch import load_file, save_file

from refine_control.cache.building import completion_sampler, write_cache
from refine_control.cache.reader import Cache
from refine_control.config import Recipe, SamplerConfig, resolved_yaml
from refine_control.errors import InvalidInputError, MissingError
from refine_control.miniature.scene_shards import scene_photos
from refine_control.models.card import CARD, read_card
from refine_control.models.loading import load_backbone
from refine_control.models.prompt_memory import PromptMemory
from refine_control.recipe_files import load_recipe
from refine_control.records import LABELED, UNLABELED, Photo
from refine_control.storage import sha256_file, write_json
from refine_control.training import loop, memory_choice, run
from refine_control.training.assembly import shape_of_run
from refine_control.training.batches import CacheBatches, MixedBatches
from refine_control.training.loop import Draw
from refine_control.training.memory import plan_memory
from refine_control.training.run import train

CODE = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from refine_control.config import Recipe
from refine_control.training.loop import leave_process_group
from refine_control.training.run import train
from refine_control.training.watch import watched
with watched():
    train(Recipe.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
leave_process_group()
"""


@pytest.fixture(scope="module")
def recipe(tiny_backbone, tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    tiny_backbone.pipeline.save_pretrained(root / "tiny")
    write_json(root / "tiny" / "refine_control.json", {"max_sequence_length": 0})
    backbone = load_backbone(root / "tiny")
    write_cache(list(scene_photos(0, 0, 6)), root / "cache", backbone, LABELED, source={})
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": str(root / "tiny"),
            "student": {"num_layers": 2},
            "objective": {"feature_normalisation": "layer"},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 2, "batch_size": 4, "log_every": 1},
            "data": {"labeled": str(root / "cache")},
        }
    )


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    return train(recipe, tmp_path_factory.mktemp("runs") / "tiny")


def test_the_student_is_a_folder_that_stock_diffusers_loads(recipe, trained):
    student = SD3ControlNetModel.from_pretrained(trained.student)
    assert student.config["num_layers"] == 2
    manifest = json.loads((trained.student / "manifest.json").read_text())
    assert manifest["recipe"] == recipe.model_dump(mode="json")
    assert (manifest["kind"], manifest["steps"], trained.steps) == ("student", 2, 2)
    assert torch.cat([p.detach().flatten() for p in student.controlnet_blocks.parameters()]).any()


def test_a_student_for_few_steps_is_saved_with_its_card(recipe, trained, tmp_path):
    assert not (trained.student / CARD).exists()
    objective = {"kind": "guidance", "x0_source": "truth", "few_step": {"teacher_guidance": 2.0, "steps": 2}}
    few = {"num_inference_steps": 4, "guidance_scale": 1.0, "sigmas": "even"}
    changed = {"objective": objective, "sampler": few, "training": {"steps": 1, "batch_size": 2}}
    student = train(Recipe.model_validate({**recipe.model_dump(), **changed}), tmp_path / "few").student
    card = read_card(student)
    assert (card.sampling, card.most_steps, card.distilled_guidance) == (SamplerConfig(**few), 4, 2.0)
    shift = json.loads((student / "scheduler" / "scheduler_config.json").read_text())["shift"]
    assert shift == load_backbone(recipe.model).shift


def test_the_same_command_again_does_nothing_and_another_recipe_is_refused(recipe, trained):
    run_dir = trained.student.parent
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*") if p.is_file()}
    assert train(recipe, run_dir) == (trained.student, 2, 0.0)
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*") if p.is_file()} == before
    with pytest.raises(InvalidInputError, match="another recipe"):
        train(recipe.model_copy(update={"name": "other"}), run_dir)


def test_threads_of_a_recipe_hold_for_its_run_alone(recipe, trained, monkeypatch):
    used = []
    monkeypatch.setattr("refine_control.training.run.run_mark", lambda *_: used.append(torch.get_num_threads()))
    two = recipe.model_copy(update={"training": recipe.training.model_copy(update={"threads": 2})})
    with pytest.raises(InvalidInputError, match="another recipe"):
        train(two, trained.student.parent)
    assert (used, torch.get_num_threads()) == ([2], 1)


def test_a_run_of_another_recipe_is_refused_with_what_changed(recipe, trained, tmp_path):
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": 3})})
    changes = r"training\.steps is 2 there and 3 here; choose another folder"
    with pytest.raises(InvalidInputError, match=f"student of another recipe, teacher or data: {changes}"):
        train(longer, trained.student.parent)
    weights = recipe.objective.weights.model_copy(update={"output_alpha": 0.9})
    other = longer.model_copy(update={"objective": recipe.objective.model_copy(update={"weights": weights})})
    with pytest.raises(InvalidInputError, match=r"output_alpha is null there and 0\.9 here, training\.steps is 2"):
        train(other, trained.student.parent)
    shutil.copytree(trained.student.parent, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")  # a run that was stopped before its student was saved
    for _ in range(2):  # a refused run leaves the recipe of the folder as it is
        with pytest.raises(InvalidInputError, match=f"unfinished run of another recipe: {changes}"):
            train(longer, tmp_path / "run")
    assert train(recipe, tmp_path / "run").steps == 2


def test_a_step_that_no_memory_holds_is_refused_before_a_weight_is_read(recipe, tmp_path, monkeypatch):
    whole = plan_memory(recipe, cpu_kernels=True).peak
    monkeypatch.setattr(memory_choice, "memory_bytes", lambda device: whole - 1)
    monkeypatch.setattr(run, "prepare", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(InvalidInputError, match=r"4 samples at once .* --set training\.device_batch_size=2$"):
        train(recipe, tmp_path)


def test_a_gpu_that_is_too_small_is_refused_and_the_plan_is_logged(recipe, tmp_path, monkeypatch, caplog):
    plan = plan_memory(recipe)
    for memory, refused in ((plan.peak, False), (plan.peak - 1, True)):
        monkeypatch.setattr(memory_choice, "memory_bytes", lambda device, memory=memory: memory)
        monkeypatch.setattr(memory_choice, "device_name", lambda device: "a small GPU")
        with pytest.raises(InvalidInputError, match="a small GPU has") if refused else nullcontext():
            memory_choice.fit_to_device(recipe, tmp_path, torch.device("cuda"), 1)
    assert caplog.text.count(plan.text) == 2


def test_auto_is_chosen_once_and_a_run_that_goes_on_keeps_it(recipe, tmp_path, monkeypatch, caplog):
    auto, cpu = memory_choice.with_settings(recipe, {"training.memory": "auto"}), torch.device("cpu")
    whole = plan_memory(recipe, cpu_kernels=True).peak
    monkeypatch.setattr(memory_choice, "at_most", lambda *_: whole)  # no step is counted where there is room for it
    chosen = memory_choice.fit_to_device(auto, tmp_path, cpu, 1)
    assert (chosen.training.device_batch_size, chosen.optimizer.kind) == (4, "adamw")
    monkeypatch.setattr(memory_choice, "memory_bytes", lambda device: whole - 1)
    smaller = memory_choice.fit_to_device(auto, tmp_path, cpu, 1)
    assert 1 <= smaller.training.device_batch_size < 4
    assert "training.device_batch_size=" in caplog.text
    (tmp_path / "recipe.yaml").write_text(resolved_yaml(smaller))
    monkeypatch.setattr(memory_choice, "memory_bytes", lambda device: 100 * whole)
    assert memory_choice.fit_to_device(auto, tmp_path, cpu, 1) == smaller
    assert memory_choice.fit_to_device(auto, tmp_path / "new", cpu, 1) == chosen
    monkeypatch.setattr(memory_choice, "memory_bytes", lambda device: whole / 100)
    with pytest.raises(InvalidInputError, match=r"90% of cpu has .* use a larger device$"):
        memory_choice.fit_to_device(auto, tmp_path / "new", cpu, 1)


def test_a_run_is_known_by_what_lies_at_its_paths(recipe, trained, tmp_path):
    model, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(recipe.model, model)
    shutil.copytree(recipe.data.labeled, cache)
    data = recipe.data.model_copy(update={"labeled": str(cache)})
    moved = recipe.model_copy(update={"model": str(model), "data": data})
    assert train(moved, tmp_path / "new", elsewhere=[trained.student.parent]) == (trained.student, 2, 0.0)
    # another teacher under the same name, and other data at the same path, are another run
    weights = model / "controlnet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights)
    with pytest.raises(InvalidInputError, match="teacher or data"):
        train(moved, trained.student.parent)
    shutil.copytree(recipe.model, model, dirs_exist_ok=True)
    assert train(moved, trained.student.parent).seconds == 0
    manifest = cache / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"source": "other shards"}))
    with pytest.raises(InvalidInputError, match="teacher or data"):
        train(moved, trained.student.parent)


def test_on_gpus_processes_speak_nccl_and_each_has_a_gpu_of_its_own(monkeypatch):
    from accelerate import PartialState

    calls, environment = [], {"RANK": "7", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr("accelerate.state.check_cuda_p2p_ib_support", lambda: True)
    for name, value in {"is_available": True, "device_count": 4, "set_device": None}.items():
        monkeypatch.setattr(
            torch.cuda, name, lambda *given, value=value, name=name: calls.append((name, *given)) or value
        )
    for name, value in {"init_process_group": None, "get_world_size": 8, "get_rank": 7}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value, **given: calls.append(given) or value)
    assert run.training_device() == torch.device("cuda", 3)
    assert not run.is_main_process()
    assert {"backend": "nccl"} in calls
    assert ("set_device", torch.device("cuda", 3)) in calls
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(InvalidInputError, match="4 processes on a machine that shows 3 GPUs"):
        run.training_device()


def test_a_gpu_without_units_for_bf16_computes_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert run.fast_precision(torch.device("cuda")) == "fp32"


def test_frozen_networks_are_in_bf16_and_what_is_trained_has_masters_in_fp32():
    networks = shape_of_run(load_recipe("mini/balanced_stage1", ["training.precision=bf16"]), False)
    frozen = [*networks.backbone.transformer.parameters(), *networks.teacher.parameters()]
    assert {weight.dtype for weight in frozen} == {torch.bfloat16}
    assert {master.dtype for master in networks.trainable.masters.values()} == {torch.float32}


def test_two_processes_make_the_student_of_one(recipe, trained, tmp_path):
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    (tmp_path / "train.py").write_text(CODE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(tmp_path / "train.py"), str(tmp_path / "recipe.json"), str(tmp_path / "two")]
    launched = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert launched.returncode == 0, launched.stderr
    logs = (
        (folder / "metrics.jsonl").read_text().splitlines() for folder in (trained.student.parent, tmp_path / "two")
    )
    for alone, together in zip(*logs, strict=True):
        for name in ("loss", "feature_loss", "grad_norm"):
            assert json.loads(together)[name] == pytest.approx(json.loads(alone)[name], rel=1e-3), name
    one, two = (
        load_file(f / "diffusion_pytorch_model.safetensors") for f in (trained.student, tmp_path / "two/student")
    )
    assert one.keys() == two.keys()
    # AdamW's first steps are as long for a gradient of rounding as for any: compared where gradients are not tiny
    close = [torch.isclose(one[k], two[k], rtol=1e-3, atol=1e-4).float().mean().item() for k in one]
    assert sum(close) / len(close) > 0.99


# Caches of several sizes, with deviations, without prompts.


def of_sizes(count, sizes=((48, 80), (64, 64), (48, 80))):
    """Scenes whose pixels are repeated to other sizes, in turn."""
    photos = []
    for number, scene in enumerate(scene_photos(0, 0, count)):
        h, w = sizes[number % len(sizes)]
        image, mask = (
            np.pad(a, [(0, 32), (0, 32), (0, 0)][: a.ndim], "wrap")[:h, :w] for a in (scene.image, scene.mask)
        )
        mask = mask if mask.any() else np.eye(h, w, dtype=bool)
        photos.append(Photo(scene.key, image, mask, scene.prompt))
    return photos


@pytest.fixture(scope="module")
def caches(recipe, tmp_path_factory):
    """Samples of two sizes as D_sl with deviations and as D_ssl without prompt embeddings."""
    root, backbone = tmp_path_factory.mktemp("sizes"), load_backbone(recipe.model)
    write_cache(of_sizes(11), root / LABELED, backbone, LABELED, source={}, posterior="mean_std")
    write_cache(of_sizes(11), root / UNLABELED, backbone, UNLABELED, source={}, prompts="none", posterior="mean_std")
    return root


def draws(count):
    return [Draw(0, "stage", step, range(4)) for step in range(count)]


@pytest.mark.parametrize("kind", ["supervised", "mixed"])
def test_a_student_learns_on_two_sizes_with_prompts_encoded_on_the_way(recipe, caches, tmp_path, kind):
    wanted = recipe.model_dump() | {"objective": {"kind": kind}}
    wanted["training"] |= {"steps": 3, "device_batch_size": 2}
    wanted["data"] = {"labeled": str(caches / LABELED), "unlabeled": str(caches / UNLABELED), "prompts": "encode"}
    made = train(Recipe.model_validate(wanted), tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert made.steps == len(losses) == 3
    assert np.isfinite(losses).all()


def test_what_a_run_cannot_use_is_refused_in_a_sentence(recipe, caches, tmp_path):
    wanted = recipe.model_dump() | {"objective": {"kind": "self_supervised"}}
    wanted["data"] = {"unlabeled": str(caches / UNLABELED)}
    with pytest.raises(InvalidInputError, match=r"no prompt embeddings; .* data\.prompts=encode"):
        train(Recipe.model_validate(wanted), tmp_path / "run")
    backbone = load_backbone(recipe.model)
    write_cache(of_sizes(2, [(80, 48)]), tmp_path / "tall", backbone, UNLABELED, source={})
    halves = CacheBatches(Cache(caches / LABELED), 2), CacheBatches(Cache(tmp_path / "tall"), 2, x0="cond_latents")
    with pytest.raises(InvalidInputError, match="different sizes"):
        MixedBatches(*halves)


def test_both_halves_of_a_mixed_batch_have_one_size_and_other_sizes_are_left_out(recipe, caches, tmp_path, caplog):
    write_cache(
        of_sizes(9, [(48, 80), (80, 48)]), tmp_path / "other", load_backbone(recipe.model), UNLABELED, source={}
    )
    labeled, unlabeled = (
        CacheBatches(Cache(caches / LABELED), 2),
        CacheBatches(Cache(tmp_path / "other"), 2, x0="cond_latents"),
    )
    mixed = MixedBatches(labeled, unlabeled)
    told = [record.getMessage() for record in caplog.records]
    assert [line.partition(" of ")[0] for line in told] == ["4 samples", "4 samples"]
    seen = set()
    for draw in draws(6):
        batch = mixed.batch(draw)
        assert batch.mask.shape == (4, 1, 6, 10)
        seen |= set(unlabeled.rows(draw._replace(slots=range(2), stage="stage unlabeled")).tolist())
    assert seen == set(range(5))
    with pytest.raises(InvalidInputError, match="one sample has no halves"):
        mixed.batch(draws(1)[0]._replace(slots=range(1)))


def test_a_batch_has_one_size_and_its_parts_are_those_of_the_whole(caches):
    batches = CacheBatches(Cache(caches / LABELED), 4)
    shapes = set()
    for draw in draws(12):
        whole = batches.batch(draw)
        parts = [batches.batch(draw._replace(slots=range(a, a + 2))) for a in (0, 2)]
        assert all(
            torch.equal(torch.cat(p), w)
            for p, w in zip(zip(*(p[:5] for p in parts), strict=True), whole[:5], strict=True)
        )
        assert whole.latents.shape[2:] == whole.cond_latents.shape[2:] == whole.mask.shape[2:]
        shapes.add(tuple(whole.latents.shape[2:]))
    assert shapes == {(6, 10), (8, 8)}


def test_clean_latents_are_drawn_around_their_mean_and_the_condition_is_the_mean(caches):
    cache = Cache(caches / LABELED)
    labeled, unlabeled = CacheBatches(cache, 4), CacheBatches(cache, 4, x0="cond_latents")
    for draw in draws(2):
        rows = labeled.rows(draw)
        first, again = labeled.batch(draw), CacheBatches(cache, 4).batch(draw)
        assert torch.equal(first.latents, again.latents)
        noise = (first.latents - cache.take("latents", rows)) / cache.take("latents_std", rows)
        drawn = draw.normals("posterior", *noise.shape[1:])
        torch.testing.assert_close(noise, drawn, rtol=1e-2, atol=1e-2)
        assert not torch.equal(drawn, draw.normals("noise", *noise.shape[1:]))
        assert torch.equal(first.cond_latents, cache.take("cond_latents", rows))
        x0 = unlabeled.batch(draw)
        assert torch.equal(x0.cond_latents, cache.take("cond_latents", rows))
        expected = x0.cond_latents + cache.take("cond_latents_std", rows) * drawn
        assert torch.equal(x0.latents, expected)
    one, two = (labeled.batch(draw).latents for draw in (draws(1)[0], draws(1)[0]._replace(seed=1)))
    assert one.shape != two.shape or not torch.equal(one, two)


def test_prompts_encoded_on_the_way_are_those_of_the_cache(recipe, caches):
    backbone = load_backbone(recipe.model)
    cached = CacheBatches(Cache(caches / LABELED), 4, prompt_dropout=0.3)
    encoded = CacheBatches(Cache(caches / LABELED), 4, 0.3, encode=PromptMemory(backbone.encode_prompts))
    for draw in draws(6):
        ours, theirs = encoded.batch(draw), cached.batch(draw)
        assert torch.equal(ours.latents, theirs.latents)
        torch.testing.assert_close(ours.prompt_embeds, theirs.prompt_embeds, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.pooled_prompt_embeds, theirs.pooled_prompt_embeds, rtol=1e-5, atol=1e-6)


def test_a_student_of_another_model_is_refused_as_a_start_and_in_every_comparison(tmp_path, tiny_student):
    from refine_control.models.loading import save_controlnet
    from refine_control.study.model_cost import load_models

    save_controlnet(tiny_student(12), tmp_path / "student", 24)  # half as wide as the miniature
    recipe = Recipe.model_validate({"name": "x", "init_from": str(tmp_path / "student")})
    with pytest.raises(InvalidInputError, match=r"init_from .*width"):
        run.new_student(recipe, load_backbone("mini"))
    with pytest.raises(InvalidInputError, match="width"):
        load_models("mini", None, {"ours": tmp_path / "student"})


# Few steps: objectives whose target network is the running mean, on caches of the teacher's paths.


@pytest.fixture(scope="module")
def paths(recipe, tmp_path_factory):
    """Four levels of guided paths, unlabelled."""
    folder = tmp_path_factory.mktemp("paths") / "cache"
    options = {"completions": completion_sampler(4, 3.0, even=True), "path": 4}
    write_cache(list(scene_photos(0, 0, 4)), folder, load_backbone(recipe.model), UNLABELED, source={}, **options)
    return folder


def few_steps(recipe, cache, objective=None, training=None, role=UNLABELED, **changed):
    """A recipe of end points with everything that a target network is asked for, in bf16."""
    few = {"first": 0.4, "rollout": 0.5, "consistency": 0.5, **(objective or {}).pop("few_step", {})}
    values = recipe.model_dump() | {"data": {role: str(cache)}} | changed
    values["objective"] = {"kind": "end_points", "x0_source": "teacher", "few_step": few, **(objective or {})}
    values["training"] |= {"steps": 4, "save_every": 2, "ema_decay": 0.9, "precision": "bf16", **(training or {})}
    return Recipe.model_validate(values)


class Killed(BaseException):
    pass


def test_a_killed_run_with_a_target_network_ends_with_the_same_bytes(recipe, paths, tmp_path, monkeypatch):
    wanted, save = few_steps(recipe, paths), loop.save_checkpoint

    def killed(run_dir, step, *rest):
        save(run_dir, step, *rest)
        if step == 2:
            raise Killed

    whole = train(wanted, tmp_path / "whole")
    monkeypatch.setattr(loop, "save_checkpoint", killed)
    with pytest.raises(Killed):
        train(wanted, tmp_path / "run")
    monkeypatch.undo()
    other = few_steps(recipe, paths, {"kind": "windows"})
    with pytest.raises(
        InvalidInputError, match=r"unfinished .*: objective\.kind is end_points there and windows here; "
    ):
        train(other, tmp_path / "run")
    again = train(wanted, tmp_path / "run")
    name = "diffusion_pytorch_model.safetensors"
    assert sha256_file(whole.student / name) == sha256_file(again.student / name)
    states = [next((tmp_path / n / "checkpoints").glob("*/state.safetensors")) for n in ("whole", "run")]
    assert sha256_file(states[0]) == sha256_file(states[1])
    logs = [
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("whole", "run")
    ]
    for one, two in zip(*logs, strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}
        assert one["consistency_loss"] > 0


def edited(cache, tmp_path, **changed):
    """The cache with other fields in its manifest."""
    shutil.copytree(cache, tmp_path / "edited")
    manifest = json.loads((cache / "manifest.json").read_text())
    completions = {**manifest["completions"], **changed.pop("completions", {})}
    write_json(tmp_path / "edited" / "manifest.json", {**manifest, **changed, "completions": completions})
    return tmp_path / "edited"


AGAIN = r"make the cache again with `refine-control cache --complete 8 --guidance 3 --path 4`"
THREE = "--complete 9 --guidance 3 --path 3`"


@pytest.mark.parametrize(
    ("manifest", "objective", "said"),
    [
        ({"teacher": "0" * 64}, {}, f"are of another teacher; {AGAIN} and this teacher"),
        (
            {"completions": {"guidance_scale": 1.0}},
            {},
            f"have guidance scale 1 and .*teacher_guidance is 3; {AGAIN}, or",
        ),
        ({}, {"few_step": {"teacher_guidance": 5.0}}, "have guidance scale 3 and .* is 5; .* --guidance 5 "),
        ({"completions": {"conditioning_scale": 0.5}}, {}, f"conditioning scale 0.5 and training has 1; {AGAIN}"),
        ({"path": 0}, {}, f"paths of 0 levels and .*steps is 4, which must divide them; {AGAIN}"),
        ({}, {"few_step": {"steps": 3}}, f"paths of 4 levels and .*steps is 3, which must divide them; .*{THREE}"),
        ({}, {"kind": "windows", "few_step": {"steps": 8}}, "paths of 4 levels and .*steps is 8"),
    ],
)
def test_paths_of_something_else_are_refused_by_name(recipe, paths, tmp_path, manifest, objective, said):
    cache = edited(paths, tmp_path, **manifest)
    with pytest.raises(InvalidInputError, match=said) as refused:
        train(few_steps(recipe, cache, dict(objective)), tmp_path / "run")
    assert str(cache) in str(refused.value)
    assert not (tmp_path / "run" / "student").exists()


def test_what_few_steps_lack_is_said_with_the_command_that_makes_it(recipe, paths, tmp_path):
    with pytest.raises(
        MissingError, match=r"no teacher completions; make them with .*--complete 8 --guidance 3 --path 4`"
    ):
        train(few_steps(recipe, recipe.data.labeled, {"few_step": {"data": LABELED}}, role=LABELED), tmp_path / "run")
    with pytest.raises(InvalidInputError, match=r"shifted by 1 and sigmas\.shift is 3; set it to null"):
        train(few_steps(recipe, paths, sigmas={"shift": 3.0}), tmp_path / "run")
