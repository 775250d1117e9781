"""What leaves the machine, byte by byte, and what a failed push says."""

import hashlib
import json
import shutil
import socket

import pytest
from safetensors.torch import load_file

from refine_control.errors import DamagedError, InvalidInputError, MissingError
from refine_control.export.push import gather, plan, push
from refine_control.models.loading import load_controlnet, verify_folder
from refine_control.pipeline.picture_cost import PictureCost
from refine_control.recipe_files import load_recipe
from refine_control.storage import read_manifest, sha256_file, write_json
from refine_control.study.row_tables import HEADINGS

ID = "me/it"
FILES = {
    "README.md",
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "grid.png",
    "manifest.json",
    "recipe.yaml",
    "refine_control.json",
    "scheduler/scheduler_config.json",
}


def hashes(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}


@pytest.fixture
def copied(trained, tmp_path):
    """The student, to be changed; its manifest is written anew by `listed`."""
    shutil.copytree(trained.student, tmp_path / "student")
    return tmp_path / "student"


def listed(folder, **described):
    """Gives a folder a manifest of all its files."""
    manifest = {**read_manifest(folder, verify=False), **described}
    names = [name for name in hashes(folder) if name != "manifest.json"]
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in names}
    write_json(folder / "manifest.json", {**manifest, "files": files})


def test_the_files_of_the_allow_list_arrive_in_one_commit_as_they_are(trained, hub, tmp_path):
    gather(trained.run, ID, tmp_path / "local", HEADINGS, evaluation=trained.evaluation)
    url = push(trained.run, ID, HEADINGS, endpoint=hub.url, evaluation=trained.evaluation)
    assert url == f"{hub.url}/me/it/commit/1"
    assert {name: hashlib.sha256(data).hexdigest() for name, data in hub.files.items()} == hashes(tmp_path / "local")
    assert hub.files.keys() == FILES
    weights = "diffusion_pytorch_model.safetensors"
    assert hub.files[weights] == (trained.student / weights).read_bytes()
    assert sum("/commit/" in call for call in hub.calls) == 1
    assert hub.created == [{"name": "it", "organization": "me"}]


def test_a_dry_run_lists_the_same_files_and_asks_no_network(trained, monkeypatch, tmp_path):
    def refuse(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    planned = plan(trained.student, ID, HEADINGS, evaluation=trained.evaluation)
    written = gather(trained.student, ID, tmp_path / "local", HEADINGS, evaluation=trained.evaluation)
    assert planned == written
    assert planned.files == {name: (tmp_path / "local" / name).stat().st_size for name in sorted(FILES)}
    assert planned.text.endswith((tmp_path / "local" / "README.md").read_text())


def test_the_repository_is_a_student_whose_recipe_names_no_place(trained, tmp_path):
    out = tmp_path / "local"
    gather(trained.student, ID, out, HEADINGS)
    verify_folder(out)
    assert len(load_controlnet(out).transformer_blocks) == 2
    recipe = load_recipe(out / "recipe.yaml")
    assert (recipe.model, recipe.teacher, recipe.init_from) == ("MODEL", None, "INIT_FROM")
    assert set(recipe.data.model_dump().values()) == {None, "cached"}
    manifest = read_manifest(out)
    assert manifest["recipe"] == recipe.model_dump(mode="json")
    assert (manifest["kind"], manifest["fingerprint"], manifest["steps"]) == ("student", "f" * 64, 7)
    texts = [path.read_text() for path in out.rglob("*") if path.suffix in (".json", ".md", ".yaml")]
    assert not [text for text in texts if "/home/" in text or str(trained.run.parent) in text]


def test_what_a_manifest_lists_beyond_the_allow_list_stays(copied, tmp_path):
    listed(copied)
    assert "notes.txt" in read_manifest(copied)["files"]
    gather(copied, ID, tmp_path / "local", HEADINGS)
    assert hashes(tmp_path / "local").keys() == FILES - {"grid.png"}


def test_the_place_where_a_network_was_loaded_from_stays(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    write_json(copied / "config.json", {**config, "_name_or_path": "/home/someone/model"})
    listed(copied)
    gather(copied, ID, tmp_path / "local", HEADINGS)
    assert json.loads((tmp_path / "local" / "config.json").read_text()) == config


def test_any_other_path_is_refused(copied, tmp_path):
    card = json.loads((copied / "refine_control.json").read_text())
    write_json(copied / "refine_control.json", {**card, "trained_by": "train /home/someone/mine.yaml"})
    listed(copied)
    with pytest.raises(InvalidInputError, match=r"refine_control\.json would hold the path /home/someone/mine\.yaml"):
        gather(copied, ID, tmp_path / "local", HEADINGS)
    assert not (tmp_path / "local").exists()


def test_the_own_transformer_of_a_student_goes_with_it(copied, tmp_path):
    (copied / "transformer_lora").mkdir()
    (copied / "transformer_lora" / "pytorch_lora_weights.safetensors").write_bytes(b"adapters")
    listed(copied)
    card = gather(copied, ID, tmp_path / "local", HEADINGS).card
    assert "transformer_lora/pytorch_lora_weights.safetensors" in hashes(tmp_path / "local")
    assert 'pipeline.load_lora_weights("me/it", subfolder="transformer_lora")' in card


def test_the_packaged_student_can_be_gathered_with_what_it_can_do(tmp_path, monkeypatch):
    monkeypatch.setattr("refine_control.export.push.load_painter", lambda model, folder: (model, folder.name))
    costs = {("mini", "mini_edge", 4): PictureCost(4, 2.5)}
    monkeypatch.setattr(
        "refine_control.export.push.picture_cost", lambda *given: costs[*given[:2], given[2].num_inference_steps]
    )
    card = gather("edge", ID, tmp_path / "local", HEADINGS).card
    weights = load_file(tmp_path / "local" / "diffusion_pytorch_model.safetensors")
    assert weights["pos_embed.proj.weight"].dim() == 4
    assert "passes of ControlNet and transformer a picture, 4 steps without guidance | 4 |" in card
    assert "| GFLOP a picture: text encoders, VAE and all passes | 2.5 |" in card
    assert "1,877,760 parameters" in card
    assert "no intervals were recorded" in card
    assert "license: apache-2.0" in card


@pytest.mark.parametrize("repo_id", ["it", "me/it/that", "me/-it", "me/i t", "", "../it"])
def test_an_id_that_cannot_be_is_refused_before_anything_is_read(repo_id, tmp_path):
    with pytest.raises(InvalidInputError, match="give USER/NAME"):
        gather(tmp_path, repo_id, tmp_path / "local", HEADINGS)


def test_a_folder_that_is_no_student_is_refused(trained, tmp_path):
    with pytest.raises(InvalidInputError, match="is no student of refine-control"):
        plan(tmp_path, ID, HEADINGS)
    with pytest.raises(InvalidInputError, match="is the report of `evaluate` or `demo`"):
        plan(trained.evaluation, ID, HEADINGS)


def test_a_damaged_student_is_refused(copied):
    with (copied / "diffusion_pytorch_model.safetensors").open("ab") as file:
        file.write(b"0")
    with pytest.raises(DamagedError, match=r"diffusion_pytorch_model\.safetensors is not the file"):
        plan(copied, ID, HEADINGS)


def test_the_student_itself_is_not_written_over(copied):
    before = hashes(copied)
    with pytest.raises(InvalidInputError, match="is the student itself"):
        gather(copied, ID, copied, HEADINGS)
    assert hashes(copied) == before


@pytest.mark.parametrize(
    ("route", "answer", "says"),
    [
        ("/api/", (401, {}), "log in again"),
        ("/commit/", (403, {}), "the token may not write to me/it"),
        ("/preupload/", (404, {"X-Error-Code": "RepoNotFound"}), "has no me/it that the token may see"),
        ("/preupload/", (403, {"X-Error-Code": "GatedRepo"}), "me/it is gated; accept its terms"),
        ("/commit/", (507, {"X-Error-Message": "quota"}), "status 507: quota"),
    ],
)
def test_a_refusal_of_the_hub_is_a_sentence(trained, hub, route, answer, says):
    hub.answers[route] = answer
    with pytest.raises(MissingError, match=says):
        push(trained.student, ID, HEADINGS, endpoint=hub.url)
    assert hub.files == {}
    assert 1 <= sum(route in call for call in hub.calls) <= 2


def test_a_hub_that_does_not_answer_is_asked_once(trained, hub, monkeypatch):
    asked = []
    original = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, at: (asked.append(at), original(self, at))[1])
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: a connection is refused
        with pytest.raises(MissingError, match=r"the push to http://127\.0\.0\.1:\d+ failed \(ConnectError"):
            push(trained.student, ID, HEADINGS, endpoint=f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert len(asked) == 1


def test_offline_is_named(trained, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    with pytest.raises(MissingError, match="HF_HUB_OFFLINE forbids"):
        push(trained.student, ID, HEADINGS, endpoint="http://127.0.0.1:9")


def test_without_a_token_it_says_how_to_log_in(trained, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(MissingError, match="not logged in to the hub; run `hf auth login`"):
        push(trained.student, ID, HEADINGS, endpoint=hub.url)
    with pytest.raises(MissingError, match="the environment variable NOWHERE is empty"):
        push(trained.student, ID, HEADINGS, endpoint=hub.url, token_env="NOWHERE")
    assert hub.calls == []


def test_a_private_push_never_reaches_a_public_repository(trained, hub):
    with pytest.raises(InvalidInputError, match="me/it is there and is public"):
        push(trained.student, ID, HEADINGS, endpoint=hub.url, private=True)
    assert hub.files == {}
    hub.private = True
    push(trained.student, ID, HEADINGS, endpoint=hub.url, private=True, revision="second")
    assert hub.created[-1]["visibility"] == "private"
    assert hub.files.keys() == FILES - {"grid.png"}
    assert any("/commit/second" in call for call in hub.calls)
    assert any("/branch/second" in call for call in hub.calls)
