"""Every proposal is what transformers' own network says at its point; what cannot be loaded says why in a sentence."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from refine_control.annotation.masks import keep_best
from refine_control.annotation.segmenter import (
    Preparation,
    box_overlaps,
    boxes_of,
    load_segmenter,
    stability_scores,
)
from refine_control.errors import InvalidInputError, MissingError

KINDS = ("sam", "sam2", "sam2_video", "sam3_tracker")
WEIGHTS = "model.safetensors"
EVERYTHING = {"points_per_side": 3, "predicted_iou": -1e9, "stability_score": 0.0, "stability_offset": 1e-3}
EVERYTHING |= {"min_area": 0.0, "overlap": 1.0, "device": "cpu"}
HEAD = {"hidden_size": 32, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
PROMPT = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 8}
MAPS = [[16, 16], [8, 8], [4, 4]]


def build(kind):
    """A network of this kind, as small as it can be, with weights that give masks."""
    import transformers as tf

    hiera = {
        "hidden_size": 8,
        "image_size": [64, 64],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 24, 32],
        "num_attention_heads_per_stage": [1, 1, 1, 1],
        "window_size_per_stage": [4, 4, 4, 4],
        "window_positional_embedding_background_size": [4, 4],
        "global_attention_blocks": [3],
    }
    vision = {"backbone_config": {"model_type": "sam2_hiera_det_model", **hiera}, "fpn_hidden_size": 32}
    vision |= {"backbone_channel_list": [32, 24, 16, 8], "backbone_feature_sizes": MAPS}
    if kind == "sam":
        small = {"hidden_size": 16, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        small |= {"image_size": 64, "patch_size": 16, "window_size": 2, "global_attn_indexes": [1]}
        small |= {"num_pos_feats": 16, "mlp_dim": 16}
        model = tf.SamModel(tf.SamConfig(vision_config=small, prompt_encoder_config=PROMPT, mask_decoder_config=HEAD))
    elif kind == "sam2":
        parts = {"vision_config": vision, "prompt_encoder_config": PROMPT, "mask_decoder_config": HEAD}
        model = tf.Sam2Model(tf.Sam2Config(**parts))
    elif kind == "sam2_video":
        parts = {"vision_config": vision, "prompt_encoder_config": PROMPT, "mask_decoder_config": HEAD}
        memory = {"memory_attention_hidden_size": 32, "memory_attention_num_layers": 1, "image_size": 64}
        memory |= {"memory_attention_feed_forward_hidden_size": 16, "memory_attention_rope_feat_sizes": [4, 4]}
        memory |= {"memory_encoder_hidden_size": 32, "memory_encoder_output_channels": 16}
        memory |= {"mask_downsampler_embed_dim": 32, "memory_fuser_num_layers": 1, "memory_fuser_embed_dim": 32}
        model = tf.Sam2VideoModel(tf.Sam2VideoConfig(**parts, **memory, memory_fuser_intermediate_dim=16))
    else:
        vit = {"model_type": "sam3_vit_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
        vit |= {"num_attention_heads": 2, "image_size": 56, "patch_size": 14, "window_size": 2}
        vit |= {"global_attn_indexes": [1], "pretrain_image_size": 28}
        vision = {"model_type": "sam3_vision_model", "backbone_config": vit, "fpn_hidden_size": 32}
        vision |= {"backbone_feature_sizes": MAPS, "scale_factors": [4.0, 2.0, 1.0]}
        prompt = {**PROMPT, "image_size": 56, "patch_size": 14}
        parts = {"vision_config": vision, "prompt_encoder_config": prompt, "mask_decoder_config": HEAD}
        model = tf.Sam3TrackerModel(tf.Sam3TrackerConfig(**parts))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each kind saved as its own class saves it; shared, so leave them as they are."""
    saved = {}
    for kind in KINDS:
        saved[kind] = tmp_path_factory.mktemp("models") / kind
        build(kind).save_pretrained(saved[kind])
    return saved


@pytest.fixture
def folder(folders, tmp_path):
    """A SAM 2 to spoil."""
    for path in folders["sam2"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def photo(height=40, width=60, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 5, width // 5, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("kind", KINDS)
def test_proposals_are_what_the_stock_network_says_at_the_points_of_the_grid(folders, kind):
    from transformers import AutoModelForMaskGeneration

    image, tall, wide = photo(), *((43, 64) if kind == "sam" else 2 * (56 if kind == "sam3_tracker" else 64,))
    segmenter = load_segmenter(folders[kind], points_per_batch=4, **EVERYTHING)
    proposals = segmenter.propose(image)
    stock = AutoModelForMaskGeneration.from_pretrained(folders[kind]).eval()
    where = [[(x + 0.5) / 3 * wide - 0.5, (y + 0.5) / 3 * tall - 0.5] for y in range(3) for x in range(3)]
    with torch.no_grad():
        out = stock(
            pixel_values=segmenter.preparation.pixels(image)[None], input_points=torch.tensor([where])[:, :, None]
        )
    scores, logits = out.iou_scores.flatten(), out.pred_masks.flatten(0, 2)
    if kind == "sam":
        logits = F.interpolate(logits[None], (64, 64), mode="bilinear")[0, :, :tall, :wide]
    masks = (F.interpolate(logits[None], (40, 60), mode="bilinear")[0] > 0).numpy()
    expected = sorted(zip(scores.tolist(), masks, strict=True), key=lambda pair: -pair[0])
    expected = [(score, mask) for score, mask in expected if mask.mean() > 0.05]
    proposals = [each for each in proposals if each.mask.mean() > 0.05]
    assert len(proposals) == len(expected) > 6
    assert len({each.mask.tobytes() for each in proposals}) > 6
    for proposal, (score, mask) in zip(proposals, expected, strict=True):
        assert proposal.mask.shape == (40, 60)
        assert proposal.mask.dtype == bool
        assert proposal.predicted_iou == pytest.approx(min(1, score), abs=1e-4)
        assert (proposal.mask != mask).mean() < 0.01
        assert 0 <= proposal.stability_score <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(40, 60), (60, 40), (7, 90)])
def test_the_network_sees_a_grid_point_where_it_stands_in_the_photo(folders, kind, size):
    segmenter = load_segmenter(folders[kind], **EVERYTHING)
    height, width = size
    points = segmenter.preparation.points(height, width, 4)[None, :, None]
    encoder, side = segmenter.model.prompt_encoder, segmenter.preparation.side
    tall, wide = segmenter.preparation.fitted(height, width)
    labels = torch.ones(points.shape[:3], dtype=torch.int)
    share = [[(x + 0.5) / 4 * wide / side, (y + 0.5) / 4 * tall / side] for y in range(4) for x in range(4)]
    seen = encoder._embed_points(points, labels, pad=False)
    there = encoder.shared_embedding(torch.tensor(share)[None, :, None])
    own = encoder.point_embed[1].weight[0] if kind == "sam" else encoder.point_embed.weight[1]
    assert torch.allclose(seen, there + own, atol=1e-3)
    assert (seen[0, 0] - seen[0, 1]).abs().max() > 0.01


def test_half_precision_is_the_encoders_alone(folders):
    exact = load_segmenter(folders["sam2"], **EVERYTHING)
    half = load_segmenter(folders["sam2"], dtype=torch.bfloat16, **EVERYTHING)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    scores = [[each.predicted_iou for each in segmenter.propose(photo())] for segmenter in (exact, half)]
    assert scores[0] != scores[1]
    assert np.allclose(scores[0][:6], scores[1][:6], atol=0.1)


def test_the_thresholds_keep_what_passes_them_and_doubles_go(folders):
    everything = load_segmenter(folders["sam2"], **EVERYTHING).propose(photo())
    firm = max((each for each in everything if each.mask.mean() > 0.15), key=lambda each: each.stability_score)
    low, soft = firm.predicted_iou - 1e-4, firm.stability_score - 1e-4
    rules = {"predicted_iou": low, "stability_score": soft, "min_area": 0.1}
    some = load_segmenter(folders["sam2"], **{**EVERYTHING, **rules}).propose(photo())
    wanted = [p for p in everything if p.predicted_iou > low and p.stability_score > soft]
    assert 0 < len(some) < len(everything)
    assert {p.mask.tobytes() for p in some} <= {p.mask.tobytes() for p in wanted}
    assert any(np.array_equal(p.mask, firm.mask) for p in some)
    assert {p.mask.tobytes() for p in wanted if p.mask.mean() > 0.15} <= {p.mask.tobytes() for p in some}
    assert len(load_segmenter(folders["sam2"], **{**EVERYTHING, "overlap": 0.7}).propose(photo())) < len(everything)
    strict = load_segmenter(folders["sam"], device="cpu")
    assert (strict.predicted_iou, load_segmenter(folders["sam2"], device="cpu").predicted_iou) == (0.88, 0.8)
    assert load_segmenter(folders["sam2"], **{**EVERYTHING, "predicted_iou": 2.0}).propose(photo()) == []


# Photos on their way in.


@pytest.mark.parametrize("size", [(40, 60), (150, 100), (65, 65), (5, 200)])
def test_sam_1_sees_what_its_own_processor_makes(size):
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    processor = SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    image = photo(*size)
    theirs = processor(images=[image], return_tensors="pt")
    ours = Preparation(64, tuple(processor.image_mean), tuple(processor.image_std), keeps_shape=True)
    assert (ours.pixels(image) - theirs["pixel_values"][0]).abs().max() <= 1.01 / 255 / 0.224
    assert tuple(theirs["reshaped_input_sizes"][0].tolist()) == ours.fitted(*image.shape[:2])


@pytest.mark.parametrize("size", [(40, 60), (150, 100), (65, 65)])
def test_sam_2_sees_the_photo_stretched_with_antialiasing_to_one_grey_level(size):
    image, mean, std = photo(*size), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    seen = Preparation(64, mean, std, keeps_shape=False).pixels(image)
    planes = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    resized = F.interpolate(planes, (64, 64), mode="bilinear", antialias=True)[0]
    levels = (seen * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]) * 255
    assert (levels - resized).abs().max() <= 1.01
    assert levels.std() > 20


def test_colour_statistics_are_the_checkpoints_own(folders, folder):
    assert load_segmenter(folder, device="cpu").preparation.mean == (0.485, 0.456, 0.406)
    assert load_segmenter(folders["sam3_tracker"], device="cpu").preparation[:2] == (56, (0.5, 0.5, 0.5))
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": {"height": 9, "width": 9}}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": own}))
    assert load_segmenter(folder, device="cpu").preparation == (64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), False)
    (folder / "preprocessor_config.json").write_text(json.dumps({**own, "image_mean": [0.7, 0.7, 0.7]}))
    assert load_segmenter(folder, device="cpu").preparation.mean == (0.7, 0.7, 0.7)


# The arithmetic.

BOXES = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5)),
    max_size=12,
)


@given(drawn=BOXES, overlap=st.floats(0, 1))
def test_doubles_are_dropped_as_the_definition_says(drawn, overlap):
    boxes = [(x, y, x + w, y + h) for x, y, w, h, _ in drawn]

    def double(a, b):
        wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        both = max(0, wide) * max(0, tall)
        sizes = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
        return np.float32(both) / np.float32(sizes - both) > overlap

    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -drawn[i][4]):
        if not any(double(boxes[i], boxes[j]) for j in kept):
            kept.append(i)
    scores = torch.tensor([float(each[4]) for each in drawn])
    overlaps = box_overlaps(torch.tensor(boxes, dtype=torch.float32).view(-1, 4)).numpy()
    assert keep_best(overlaps, scores.numpy(), overlap) == kept


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 3), st.floats(-2, 2))
def test_boxes_and_stability_are_what_they_are_called(seed, offset, shift):
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(seed)) + shift - 1
    for mask, box in zip((logits > 0).numpy(), boxes_of(logits > 0).tolist(), strict=True):
        y, x = np.nonzero(mask)
        assert box == ([x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0, 0, 0, 0])
    for one, score in zip(logits.numpy(), stability_scores(logits, offset).tolist(), strict=True):
        inner, outer = one > offset, one > -offset
        iou = (inner & outer).sum() / max(1, (inner | outer).sum())
        assert score == pytest.approx(iou)


# What cannot be loaded.


def test_the_name_says_model_and_revision(folders, folder):
    name = load_segmenter(folders["sam"], device="cpu").name
    assert re.fullmatch(r"sam@[0-9a-f]{12}", name)
    assert load_segmenter(folder, **EVERYTHING).propose(photo())[0].source.startswith(f"{folder.name}@")
    config = json.loads((folder / "config.json").read_text())
    before = load_segmenter(folder, device="cpu").name
    (folder / "config.json").write_text(json.dumps({**config, "initializer_range": 0.03}))
    assert load_segmenter(folder, device="cpu").name != before


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "none", "nobody-at-all/no-such-model"])
def test_a_model_that_is_not_there_is_told_and_the_way_to_it(name):
    kind = MissingError if name.startswith("nobody") else InvalidInputError
    with pytest.raises(kind, match="hf download"):
        load_segmenter(name)


def test_a_folder_without_weights_or_config_is_missing_them(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(MissingError, match=r"no model\.safetensors"):
        load_segmenter(folder)
    (folder / "config.json").unlink()
    with pytest.raises(MissingError, match=r"no config\.json"):
        load_segmenter(folder)


def test_weights_that_are_cut_or_lack_a_tensor_are_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    lacking = {name: tensor for name, tensor in tensors.items() if name != "mask_decoder.iou_token.weight"}
    save_file(lacking, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(InvalidInputError, match=r"lack 1 tensors, first mask_decoder\.iou_token"):
        load_segmenter(folder)
    save_file({**tensors, "mask_decoder.iou_token.weight": torch.zeros(1, 31)}, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(InvalidInputError, match="download the model again"):
        load_segmenter(folder)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(InvalidInputError, match="download the model again"):
        load_segmenter(folder)


def test_models_of_other_kinds_are_refused(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "sam3"}))
    with pytest.raises(InvalidInputError, match="'sam3', which finds no regions from points"):
        load_segmenter(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InvalidInputError, match="not JSON"):
        load_segmenter(folder)
    if not torch.cuda.is_available():
        with pytest.raises(MissingError, match="sees no GPU"):
            load_segmenter(folder, device="cuda")
