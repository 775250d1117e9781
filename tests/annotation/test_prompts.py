"""Laws of prompts: what the model is shown, how any answer is read, which prompts are doubtful, and the variants."""

import json
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refine_control.annotation.prompts import (
    COLOURS,
    MIN_CROP,
    MIN_SIDE,
    TEMPLATE_VERSION,
    WORDS,
    crop_around,
    describe_many,
    draw_outline,
    global_request,
    local_request,
    parse,
    problems,
)
from refine_control.annotation.refusals import Unanswered
from refine_control.annotation.reword import Worded, local_prompt_from, variant
from refine_control.errors import InvalidInputError, MissingError

CODES = {
    "not_json",
    "empty",
    "too_short",
    "too_long",
    "not_english",
    "talks_about_mask",
    "talks_about_rest",
    "repeats",
}


def photo(height: int = 60, width: int = 90, colour: tuple[int, int, int] = (90, 90, 90)) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def box(height: int, width: int, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


# What the model sees


def test_the_outline_surrounds_the_region_and_covers_none_of_it():
    image, mask = photo(), box(60, 90, 20, 30, 40, 60)
    shown, name = draw_outline(image, mask)
    line = (shown != image).any(2)
    assert not (line & mask).any()
    assert (shown[line] == COLOURS[name]).all()
    grown = box(60, 90, 18, 28, 42, 62)
    assert np.array_equal(line, grown & ~mask)
    assert (image == 90).all()  # the caller's photo is as it was


@pytest.mark.parametrize("name", COLOURS)
def test_the_outline_has_another_colour_than_the_photo(name):
    shown, chosen = draw_outline(photo(colour=COLOURS[name]), box(60, 90, 20, 30, 40, 60))
    assert chosen != name
    request = local_request(photo(colour=COLOURS[name]), box(60, 90, 20, 30, 40, 60))
    assert f"{chosen} line" in request.text
    assert not request.whole
    assert np.array_equal(request.pictures[0], shown)


def test_the_crop_holds_the_region_with_a_margin():
    image = photo(600, 800)
    image[:, :, 0], image[:, :, 1] = np.arange(600)[:, None] // 3, np.arange(800) // 4
    crop = crop_around(image, box(600, 800, 200, 300, 300, 500))  # 100 x 200, so 50 on each side
    assert np.array_equal(crop, image[150:350, 250:550])
    assert np.array_equal(crop_around(image, box(600, 800, 0, 0, 600, 10), 600), image[:, :160])  # as far as it goes
    assert max(crop_around(image, box(600, 800, 9, 9, 19, 19)).shape) == MIN_CROP


@settings(max_examples=40)
@given(
    st.tuples(st.integers(1, 150), st.integers(1, 150)),
    st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    st.integers(40, 90),
)
@example((1, 400), (0.0, 0.99), 40)
@example((400, 1), (0.99, 0.0), 300)
@example((141, 2), (0.5, 0.0), 40)
def test_pictures_of_any_photo_have_sides_that_a_model_takes(size, where, max_side):
    mask = np.zeros(size, bool)
    mask[int(where[0] * size[0]), int(where[1] * size[1])] = True
    image = photo(*size)
    request = local_request(image, mask, max_side)
    pictures = [*request.pictures, *global_request(image, max_side).pictures]
    assert len(pictures) == 3
    for picture in pictures:
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
        assert min(picture.shape[:2]) >= MIN_SIDE
        assert max(picture.shape[:2]) <= max_side
    if size != (1, 1):  # one pixel of a large photo can be found in the small picture
        assert (request.pictures[0] == COLOURS[request.text.split(" line")[0].split()[-1]]).all(2).any()


def test_a_region_that_is_none_is_refused():
    for mask in (np.zeros((60, 90), bool), np.ones((90, 60), bool)):
        with pytest.raises(InvalidInputError, match="at least one pixel"):
            local_request(photo(), mask)
    assert len(local_request(photo(), np.ones((60, 90), bool)).pictures) == 2


# What the model says


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        ('{"prompt": "a brown dog"}', "a brown dog"),
        ('```json\n{"prompt": "A brown dog."}\n```', "a brown dog"),
        ('Sure! Here it is:\n{"confidence": 0.9, "prompt": " a brown\\ndog "} Anything else?', "a brown dog"),
        ('{"prompt": "a draft"} No, better: {"prompt": "a brown dog"}', "a brown dog"),
        ('{"answer": {"prompt": "a brown dog"}}', "a brown dog"),
        ('[{"prompt": "a brown dog"}]', "a brown dog"),
        ('{"prompt": "a sign that says {OPEN}"}', "a sign that says {OPEN}"),
        ('{"prompt": "a brown dog", "visible": tru', 'a brown dog", "visible": tru'),
        ('{"prompt": "a brown d', "a brown d"),
        ("{'prompt': 'a brown dog'}", "a brown dog"),
        ('"A brown dog."', "a brown dog"),
        ("a brown dog", "a brown dog"),
        ("Anna's dog...", "Anna's dog..."),
        ('{"prompt": "a caf\\u00e9"}', "a café"),
        ('{"prompt": ""}', ""),
        ('{"prompt": 3}', '{"prompt": 3}'),
        ("", ""),
    ],
)
def test_an_answer_is_read_whatever_is_around_it(answer, prompt):
    assert parse(answer) == prompt


HARD = ["{" * 30_000, '{"a":' * 9_000, '{"prompt": "' * 3_000, '"prompt": ' + " " * 19_000, "[" * 25_000, "\ud800"]
HARD += [
    '{"prompt": "\\ud800 dog"}',
    "9" * 19_000,
    '{"prompt": ' + "9" * 6_000 + "}",
    "against a " * 2_000,
    "a " * 9_999,
]


@settings(max_examples=60)
@given(st.text() | st.text().map(lambda words: json.dumps({"prompt": words})), st.booleans())
@example("{}", False)
@pytest.mark.parametrize("before", ["", "```json\n", '{"prompt": "'])
def test_any_text_is_read_and_judged(before, answer, whole):
    prompt = parse(before + answer)
    assert prompt == " ".join(prompt.split())
    found = problems(prompt, whole)
    assert set(found) <= CODES
    assert len(set(found)) == len(found)
    assert ("empty" in found) == (not any(sign.isalnum() for sign in prompt))
    problems(answer, whole)


@pytest.mark.parametrize("answer", HARD, ids=range(len(HARD)))
def test_hostile_text_is_read_and_judged(answer):
    limit = sys.getrecursionlimit()
    assert len(parse(answer)) <= 1000
    assert set(problems(answer)) <= CODES
    assert sys.getrecursionlimit() == limit


FINE = [
    "a red kite",
    "green foliage",
    "goslings swimming on a lake",
    "a dark-haired man seen from behind",
    "a carved wooden mask",
    "a man wearing a gas mask",
    "the face of an old man with a white beard",
    "a bear walking at the edge of the water",
    "two elephants on the horizon",
    "a woman leaning against a tree",
    "a framed picture on a wall",
    "a triangular section of a glass pyramid",
    "a crêpe with jalapeños in a café",
    "a man and a woman holding a baby's hand",
]


@pytest.mark.parametrize("prompt", FINE)
def test_a_plain_prompt_has_no_problem(prompt):
    assert problems(prompt) == []


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ("", "empty"),
        (" ... !", "empty"),
        ("dog", "too_short"),
        ("a " + "very " + " ".join(f"w{n}" for n in range(WORDS[False][1])), "too_long"),
        ("一只 棕色的 狗", "not_english"),
        ("a brown собака", "not_english"),
        ("été à côté", "not_english"),
        ("the masked area of a wall", "talks_about_mask"),
        ("a dog outlined in red", "talks_about_mask"),
        ("the highlighted region", "talks_about_mask"),
        ("the image shows a dog", "talks_about_mask"),
        ("A photo of a dog", "talks_about_mask"),
        ("a dog inside the line", "talks_about_mask"),
        ("a dog in front of a house", "talks_about_rest"),
        ("a dog next to a tree", "talks_about_rest"),
        ("a dog on the left of the bench", "talks_about_rest"),
        ("a dog with hills in the background", "talks_about_rest"),
        ("a dog behind a fence", "talks_about_rest"),
        ("a tower against a bright blue sky", "talks_about_rest"),
        ("a dog dog", "repeats"),
        ("a brown dog and a brown dog and a brown dog", "repeats"),
        ('{"colour": "brown dog"}', "not_json"),
        ("```brown dog", "not_json"),
    ],
)
def test_a_doubtful_prompt_has_its_code(prompt, code):
    assert problems(prompt) == [code]


def test_the_whole_photo_may_be_told_as_it_is():
    caption = "a brown dog sits in front of a house next to a tree, with snowy hills in the background under a grey sky"
    assert "talks_about_rest" in problems(caption)
    assert problems(caption, whole=True) == []
    assert problems("a photo of a dog on a beach", whole=True) == ["talks_about_mask"]
    assert problems("a dog", whole=True) == ["too_short"]


# Question and answer


class Scripted:
    """Answers as told; keeps what it was asked."""

    name = "scripted@1"

    def __init__(self, *rounds):
        self.rounds, self.asked = list(rounds), []

    def answer(self, requests):
        self.asked.append(list(requests))
        return self.rounds.pop(0)


def told(prompt: str) -> str:
    return json.dumps({"prompt": prompt})


def test_only_faulty_answers_are_asked_for_again_with_the_fault_named():
    masks = [box(60, 90, 5 * n, 30, 5 * n + 20, 60) for n in range(4)]
    first = [told("a brown dog"), "a grey cat", told("the region"), told("a red kite")]
    engine = Scripted(first, [told("a grey cat"), told("the masked region")])
    found = describe_many(engine, [local_request(photo(), mask) for mask in masks])
    assert [each.prompt for each in found] == ["a brown dog", "a grey cat", "the masked region", "a red kite"]
    assert [each.problems for each in found] == [(), (), ("talks_about_mask",), ()]
    assert [each.attempts for each in found] == [1, 2, 2, 1]
    assert {each.source for each in found} == {f"scripted@1, template {TEMPLATE_VERSION}"}
    asked, again = engine.asked
    assert [request.pictures for request in again] == [asked[1].pictures, asked[2].pictures]
    assert all(new.text.startswith(old.text) for new, old in zip(again, asked[1:3], strict=True))
    assert "JSON of the form" in again[0].text.removeprefix(asked[1].text)
    assert "the line, the region" in again[1].text.removeprefix(asked[2].text)


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        (told("dog"), told("the region"), "the region"),  # equally bad: the later
        (told("dog"), told(""), "dog"),  # empty is the worst
        (told(""), "the masked dog", "the masked dog"),
        (told("the region"), "next to the region", "the region"),
    ],
)
def test_of_two_faulty_answers_the_better_stays_and_is_marked(first, second, kept):
    request = local_request(photo(), box(60, 90, 5, 30, 25, 60))
    (found,) = describe_many(Scripted([first], [second]), [request])
    assert found.prompt == kept
    assert found.problems
    assert found.attempts == 2


def test_a_refusal_is_passed_on_and_one_of_the_second_question_leaves_the_first_answer():
    refused, gone = Unanswered("filtered"), Unanswered("gone", MissingError("no server"))
    requests = [local_request(photo(), box(60, 90, 5 * n, 30, 5 * n + 20, 60)) for n in range(3)]
    engine = Scripted([refused, told("dog"), told("cat")], [refused, gone])
    first, second, third = describe_many(engine, requests)
    assert (first, third) == (refused, gone)
    assert (second.prompt, second.problems) == ("dog", ("too_short",))
    assert len(engine.asked[1]) == 2


def test_global_and_local_questions_mix_and_nothing_is_asked_of_nobody():
    requests = [global_request(photo()), local_request(photo(), box(60, 90, 5, 30, 25, 60))]
    caption = "a dog in front of a house"
    found = describe_many(Scripted([told(caption)] * 2, [told("a dog")]), requests)
    assert [(each.prompt, each.attempts) for each in found] == [(caption, 1), ("a dog", 2)]
    assert describe_many(Scripted(), []) == []


# Variants

SAMPLES = [Worded(f"photo {n // 2}", f"prompt {n}", "dog" if n % 3 else "", f"whole {n // 2}") for n in range(9)]


def test_variants_keep_the_order_and_the_number():
    assert variant(SAMPLES, "given") == [f"prompt {n}" for n in range(9)]
    assert variant(SAMPLES, "template") == ["a dog" if n % 3 else "an object" for n in range(9)]
    assert variant(SAMPLES, "global") == [f"whole {n // 2}" for n in range(9)]
    for kind in ("given", "template", "shuffled", "global"):
        assert variant([], kind) == []
    with pytest.raises(InvalidInputError, match="1 of 9 samples have no global"):
        variant([*SAMPLES[:8], SAMPLES[8]._replace(global_prompt=" ")], "global")
    with pytest.raises(InvalidInputError, match="choose given"):
        variant(SAMPLES, "better")  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(0, 2**62))
def test_shuffled_is_a_derangement_between_photos_wherever_there_is_one(photos, seed):
    samples = [Worded(f"photo {photo}", f"{photo} {n}") for n, photo in enumerate(photos)]
    if 2 * max(Counter(photos).values()) > len(photos):
        with pytest.raises(InvalidInputError, match="more than half"):
            variant(samples, "shuffled", seed)
        return
    found = variant(samples, "shuffled", seed)
    assert found == variant(samples, "shuffled", seed)
    assert sorted(found) == sorted(each.prompt for each in samples)
    assert all(prompt.split()[0] != str(photo) for prompt, photo in zip(found, photos, strict=True))


def test_seeds_shuffle_differently():
    assert len({tuple(variant(SAMPLES, "shuffled", seed)) for seed in range(20)}) > 15


@pytest.mark.parametrize(
    ("category", "prompt"),
    [
        ("dog", "a dog"),
        ("apple", "an apple"),
        ("scissors", "scissors"),
        ("wine_glass", "a wine glass"),
        ("wall-brick", "a brick wall"),
        ("building-other-merged", "a building"),
        ("sky-other-merged", "sky"),
        ("", "an object"),
        ("other", "an object"),
    ],
)
def test_a_category_as_a_prompt(category, prompt):
    assert local_prompt_from(category) == prompt
