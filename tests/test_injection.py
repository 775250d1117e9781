"""Which layer feeds which block: every layer count, and the installed diffusers asked itself."""

from itertools import combinations

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given
from hypothesis import strategies as st

from refine_control.injection import (
    diffusers_layer_of_block,
    expand_residuals,
    flux_layer_of_block,
    groups,
    is_layer_of_site,
    layer_of_site,
    relevant_layer_of_site,
    sites_of_layer,
    stock_injects_exactly,
)

COUNTS = range(1, 24)
LAYERS_AND_SITES = st.integers(1, 60).flatmap(lambda sites: st.tuples(st.integers(1, sites), st.just(sites)))


@given(LAYERS_AND_SITES)
def test_every_layer_is_used_in_order_and_groups_differ_by_one_at_most(drawn):
    layers, sites = drawn
    found = groups(layers, sites)
    assert [site for group in found for site in group] == list(range(sites))
    sizes = {len(group) for group in found}
    assert len(found) == layers
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert layer_of_site(layers, sites) == [j for j, group in enumerate(found) for _ in group]


def test_twelve_layers_are_the_pairs_of_the_paper():
    assert groups(12) == [*([2 * j, 2 * j + 1] for j in range(11)), [22]]


def test_twenty_three_layers_are_one_to_one():
    assert layer_of_site(23) == list(range(23))


def test_stock_is_exact_for_these_layer_counts_alone():
    assert [count for count in COUNTS if stock_injects_exactly(count)] == [1, 2, 3, 4, 6, 8, 12]


def test_twenty_three_layers_are_shifted_by_diffusers():
    assert diffusers_layer_of_block(23)[:23] == [0, 0, *range(1, 22)]


@pytest.mark.parametrize("count", COUNTS)
def test_expansion_has_one_residual_for_each_block(count):
    names = [f"layer {j}" for j in range(count)]
    exact, stock = (expand_residuals(names, injection=injection) for injection in ("exact", "diffusers"))
    assert len(exact) == len(stock) == 24
    assert exact[:23] == [names[layer] for layer in layer_of_site(count)]
    assert exact[23] == names[-1]
    assert stock == [names[layer] for layer in diffusers_layer_of_block(count)]


@given(LAYERS_AND_SITES)
def test_expansion_serves_other_block_counts(drawn):
    layers, sites = drawn
    assert expand_residuals(range(layers), sites + 1)[:sites] == layer_of_site(layers, sites)


@pytest.mark.parametrize("count", [0, 24, 25])
def test_a_layer_count_that_does_not_fit_is_refused(count):
    with pytest.raises(ValueError, match="1 to 23 layers"):
        layer_of_site(count)
    with pytest.raises(ValueError, match="1 to 23 layers"):
        expand_residuals(["residual"] * count)


def test_a_map_of_its_own_says_which_residual_each_block_gets():
    layers = [0] + [1] * 20 + [2] * 2
    assert expand_residuals("abc", 24, layers) == ["abc"[layer] for layer in [*layers, 2]]
    assert not stock_injects_exactly(3, 24, layers)
    assert stock_injects_exactly(3, 24, layer_of_site(3))
    assert is_layer_of_site(layers, 3, 23)
    assert not is_layer_of_site(layers, 4, 23)


# Groups by relevance.

RELEVANCE = st.integers(2, 7).flatmap(
    lambda sites: st.tuples(st.just(sites), st.integers(1, sites), st.integers(0, 99))
)


def sharing_cost(layers, relevance, f):
    """sum_s r_s |f^s - mean of its group|^2 / |f^s|^2 of residuals f (R, D), written out."""
    means = [f[group].mean(0) for group in sites_of_layer(layers)]
    return sum(r * ((x - means[j]) ** 2).mean() / (x**2).mean() for r, x, j in zip(relevance, f, layers, strict=True))


@given(RELEVANCE)
def test_groups_by_relevance_are_the_cheapest_of_all_contiguous_ones(drawn):
    sites, count, seed = drawn
    generator = np.random.default_rng(seed)
    relevance, f = generator.random(sites), generator.normal(size=(sites, 5)).cumsum(0)
    found = relevant_layer_of_site(relevance, f @ f.T / 5, count)
    assert is_layer_of_site(found, count, sites)
    ways = [np.bincount([0, *cuts], minlength=sites).cumsum() - 1 for cuts in combinations(range(1, sites), count - 1)]
    least = min(sharing_cost(list(map(int, way)), relevance, f) for way in ways)
    assert sharing_cost(found, relevance, f) == pytest.approx(least, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("relevance", [0.0, 0.3])
def test_equally_relevant_sites_that_have_nothing_in_common_are_shared_evenly(count, relevance):
    found = relevant_layer_of_site(np.full(23, relevance), 2 * np.eye(23), count)
    sizes = [len(group) for group in sites_of_layer(found)]
    assert sum(sizes) == 23
    assert len(sizes) == count
    assert max(sizes) - min(sizes) <= 1


def test_relevant_sites_share_least():
    relevance = np.ones(23)
    relevance[[0, 21, 22]] = 20, 30, 40
    drift = 0.9 ** np.abs(np.subtract.outer(range(23), range(23)))
    shared = sites_of_layer(relevant_layer_of_site(relevance, drift, 12))
    assert [shared[0], *shared[-2:]] == [[0], [21], [22]]
    silent = relevant_layer_of_site(np.zeros(23), np.zeros((23, 23)), 12)
    assert is_layer_of_site(silent, 12, 23)


@pytest.mark.parametrize("count", [0, 24])
def test_groups_by_relevance_of_no_such_number_are_refused(count):
    with pytest.raises(ValueError, match="1 to 23 layers"):
        relevant_layer_of_site(np.ones(23), np.eye(23), count)


class Watched(list):
    """A list that notes which of its entries are asked for."""

    def __init__(self, items):
        super().__init__(items)
        self.asked = []

    def __getitem__(self, index):
        self.asked.append(index)
        return super().__getitem__(index)


def run(transformer, residuals):
    generator = torch.Generator().manual_seed(0)
    return transformer(
        hidden_states=torch.randn(1, 16, 8, 8, generator=generator),
        timestep=torch.tensor([300.0]),
        encoder_hidden_states=torch.randn(1, 18, 64, generator=generator),
        pooled_projections=torch.randn(1, 64, generator=generator),
        block_controlnet_hidden_states=residuals,
        return_dict=False,
    )[0]


def residuals_of(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 64, 32, generator=generator).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("count", [1, 5, 12, 15, 23])
def test_the_installed_transformer_takes_what_the_rules_say(tiny_backbone, count):
    watched = Watched(residuals_of(count))
    with torch.no_grad():
        stock = run(tiny_backbone.transformer, watched)
        same = run(tiny_backbone.transformer, expand_residuals(list(watched), injection="diffusers"))
        exact = run(tiny_backbone.transformer, expand_residuals(list(watched)))
    assert watched.asked[:23] == diffusers_layer_of_block(count)[:23]
    assert torch.equal(stock, same)
    assert torch.equal(stock, exact) == stock_injects_exactly(count)


def test_exact_injection_reads_one_entry_for_each_site(tiny_backbone):
    watched = Watched(expand_residuals(residuals_of(12)))
    with torch.no_grad():
        run(tiny_backbone.transformer, watched)
    assert watched.asked == list(range(23))


def test_the_gradient_reaches_every_layer_of_the_teacher_and_misses_the_last_in_stock(tiny_backbone):
    reached = {}
    for name in ("exact", "stock"):
        residuals = residuals_of(23)
        run(tiny_backbone.transformer, expand_residuals(residuals) if name == "exact" else residuals).sum().backward()
        reached[name] = [r.grad is not None and bool(r.grad.any()) for r in residuals]
    assert reached["exact"] == [True] * 23
    assert reached["stock"] == [True] * 22 + [False]


@pytest.mark.parametrize(("blocks", "single_blocks"), [(19, 38), (5, 7)])
def test_the_installed_flux_transformer_takes_what_the_rules_say(blocks, single_blocks):
    size = {"in_channels": 4, "attention_head_dim": 8, "num_attention_heads": 1, "joint_attention_dim": 8}
    transformer = FluxTransformer2DModel(
        num_layers=blocks, num_single_layers=single_blocks, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), **size
    )
    text = {"encoder_hidden_states": torch.zeros(1, 1, 8), "pooled_projections": torch.zeros(1, 8)}
    ids = {"txt_ids": torch.zeros(1, 3), "img_ids": torch.zeros(1, 3), "timestep": torch.tensor([0.5])}
    for count in (1, 2, 4, 5, 6, 8, 12, 19, 38):
        for repeat in (False, True):
            double, single = (Watched([torch.zeros(1, 1, 8)] * count) for _ in range(2))
            with torch.no_grad():
                transformer(
                    torch.zeros(1, 1, 4),
                    controlnet_block_samples=double,
                    controlnet_single_block_samples=single,
                    controlnet_blocks_repeat=repeat,
                    **text,
                    **ids,
                )
            assert double.asked == flux_layer_of_block(count, blocks, repeat)
            assert single.asked == flux_layer_of_block(count, single_blocks)


@given(st.integers(1, 120), st.integers(1, 60))
def test_a_flux_controlnet_of_the_layers_that_are_read_feeds_the_same_blocks(layers, blocks):
    read = flux_layer_of_block(layers, blocks)
    assert flux_layer_of_block(max(read) + 1, blocks) == read


@given(st.integers(3, 60))
def test_stock_sd3_misses_the_last_layer_alone_of_more_than_half_as_many_as_blocks(blocks):
    for layers in range(1, blocks):
        read = {*diffusers_layer_of_block(layers, blocks)[: blocks - 1]}
        assert {*range(layers)} - read == ({layers - 1} if 2 * layers > blocks else set())
