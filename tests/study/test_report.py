"""The report is one offline file: escaped, well-formed, the same bytes for the same data; logs are read back."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from refine_control.errors import DamagedError, InvalidInputError
from refine_control.picture_grid import OUTLINE, PictureGrid, contact_sheet, picture_cells, picture_grid, repaint_grid
from refine_control.records import Photo
from refine_control.study.curves import Curve, draw, plot, read_metrics_jsonl
from refine_control.study.report import ReportData, render_report, write_report
from refine_control.study.tables import Table, to_latex

ATTACK = "a red circle <script>alert(1)</script> & \"quotes\" <img src=x onerror='x'>"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements, texts and pictures of a page; fails on a tag that is not closed where it should be."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.texts, self.sources = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(data.strip())

    def pictures(self):
        return [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))))
            for source in self.sources
        ]


def make_grid(rows=2, side=64):
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (rows, 3, side, side, 3), dtype=np.uint8)
    mask = np.zeros((side, side), bool)
    mask[side // 4 : side // 2, side // 4 :] = True
    captions = [ATTACK, *["a blue ring"] * (rows - 1)]
    return PictureGrid(["Original", "Teacher", "Student"], [list(row) for row in pictures], captions, [mask, None])


def test_a_row_shows_the_hole_or_what_the_controlnet_was_shown():
    image, cond, painted = (np.full((8, 8, 3), level, np.uint8) for level in (200, 90, 120))
    mask = np.arange(64).reshape(8, 8) < 20
    region, whole = Photo("a", image, mask, "a dog"), Photo("b", image, np.ones_like(mask), "a cat", cond=cond)
    grid = repaint_grid([region], {"teacher": [painted]})
    assert (grid.columns, grid.captions) == (["original", "masked", "teacher"], ["a dog"])
    np.testing.assert_array_equal(grid.rows[0][1][..., 0], np.where(mask, 0, 200))
    np.testing.assert_array_equal(grid.masks[0], mask)
    grid = repaint_grid([whole], {"teacher": [painted]})
    assert (list(grid.columns), list(grid.masks)) == (["original", "condition", "teacher"], [None])
    for picture, expected in zip(grid.rows[0], (image, cond, painted), strict=True):
        np.testing.assert_array_equal(picture, expected)


def make_data(**changes):
    steps = np.arange(0, 500)
    noise = 1 + 0.5 * np.sin(2.0 * steps)
    data = ReportData(
        title="Half the <ControlNet>",
        summary=["It keeps 76.5 % of the gap.", ATTACK],
        facts={"Scenes": "500", "Command": "refine-control demo --seed 0"},
        tables=[
            Table(
                "Quality",
                ["Row", "PSNR (dB)", "Blocks"],
                [["Teacher", "19.71 [19.57, 19.85]", "24 + 23 blocks"], ["<Student>", "19.25", "24 + 12 blocks"]],
                ["Mean over scenes."],
            )
        ],
        pictures={"grid.png": make_grid()},
        curves=[
            Curve("Losses <b>", {"task": (steps, noise / (1 + steps)), "rate": (steps, 2 / (1 + steps))}, log_y=True),
            Curve("Layers", {f"feature_loss/{i:02d}": ([0, 10], [i + 1.0, 0.5]) for i in range(12)}),
        ],
        signatures=["code 0.1.0", "teacher sha256 6726825d"],
    )
    return dataclasses.replace(data, **changes)


def test_the_page_is_well_formed_and_shows_everything():
    page = Page(render_report(make_data()))
    text = " ".join(page.texts)
    expected = ["Half the <ControlNet>", "It keeps 76.5 % of the gap.", "refine-control demo --seed 0", "PSNR (dB)"]
    expected += ["19.71 [19.57, 19.85]", "<Student>", "24 + 12 blocks", "Mean over scenes.", "a blue ring"]
    expected += ["Losses <b>", "feature_loss/11", "code 0.1.0", "teacher sha256 6726825d"]
    assert [part for part in expected if part not in text] == []
    assert sum(tag == "svg" for tag, _ in page.elements) == 2


def test_a_table_in_latex_is_one_that_latex_reads():
    text = to_latex(Table("a_b & c", ["x^2", "a ~ b"], [["{50 %}", "1 < 2"]], ["E |f|^2, #1, \\n"]))
    assert r"\caption{a\_b \& c}" in text
    assert r"x\textasciicircum{}2 & a \textasciitilde{} b \\" in text
    assert r"\{50 \%\} & 1 $<$ 2 \\" in text
    assert r"E $|$f$|$\textasciicircum{}2, \#1, \textbackslash{}n" in text


def test_the_page_fetches_nothing_and_runs_nothing():
    html = render_report(make_data())
    page = Page(html)
    assert re.findall(r"(?i)(?:https?:|ftp:|file:)//\S*|url\(|@import", html) == []
    assert len(page.sources) == 6
    assert {source.partition(",")[0] for source in page.sources} == {"data:image/png;base64"}
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "base"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_every_text_is_escaped():
    marked = "<u>&'\""
    fields = {
        "title": marked,
        "summary": [marked],
        "facts": {marked: marked, "command " + marked: marked},
        "tables": [Table(marked, ["Row", marked], [[marked, marked], [marked, marked + " [1, 2]"]], [marked])],
        "pictures": {"a": dataclasses.replace(make_grid(), columns=[marked] * 3, captions=[marked] * 2, title=marked)},
        "curves": [Curve(marked, {marked: ([0, 1], [1, 2])})],
        "signatures": [marked],
    }
    for name, value in fields.items():
        html = render_report(make_data(**{"pictures": {}, "curves": (), name: value}))
        page = Page(html)
        assert "<u>" not in html, name
        assert "u" not in {tag for tag, _ in page.elements}, name
        assert any(marked in text for text in page.texts), name
        assert all(a["alt"] == f"{marked}: {marked}" for tag, a in page.elements if tag == "img"), name
    assert "<script" not in render_report(make_data())


def test_the_same_data_give_the_same_bytes(tmp_path):
    write_report(tmp_path / "a.html", make_data())
    write_report(tmp_path / "b.html", make_data())
    first = (tmp_path / "a.html").read_bytes()
    assert first == (tmp_path / "b.html").read_bytes()
    write_report(tmp_path / "b.html", make_data(title="Another"))
    assert first != (tmp_path / "b.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]
    assert picture_grid(make_grid()) == picture_grid(make_grid())


def test_a_page_of_a_title_alone():
    page = Page(render_report(ReportData("Empty", [])))
    assert page.texts == ["Empty", "Empty"]
    Page(render_report(ReportData("Empty", [], tables=[Table("none", ["Row", "PSNR"], [])])))


def test_numbers_stand_right_and_words_left():
    page = Page(render_report(make_data(pictures={}, curves=())))
    cells = [a.get("class") for tag, a in page.elements if tag in ("td", "th")]
    assert cells == [None, "number", None] * 3
    # room under an interval is left by style, not by a copy of another row's numbers
    assert " ".join(page.texts).count("[19.57, 19.85]") == 1
    assert [a["data-room"] for _, a in page.elements if "data-room" in a] == ["[19.57, 19.85]"]


def test_embedded_pictures_are_the_pictures_enlarged_by_three():
    grid = make_grid()
    shown = Page(render_report(make_data())).pictures()
    for picture, embedded in zip([p for row in grid.rows for p in row][1:], shown[1:], strict=True):
        np.testing.assert_array_equal(embedded, picture.repeat(3, axis=0).repeat(3, axis=1))


def test_the_outline_surrounds_the_mask_and_hides_nothing_in_it():
    grid = make_grid()
    plain = grid.rows[0][0].repeat(3, axis=0).repeat(3, axis=1)
    mask = grid.masks[0].repeat(3, axis=0).repeat(3, axis=1)
    outlined = np.asarray(picture_cells(grid)[0][0])
    colored = (outlined == OUTLINE).all(axis=2)
    assert colored[16 * 3 - 1, 20 * 3]
    assert colored[32 * 3, 20 * 3]
    assert colored[20 * 3, 16 * 3 - 1]
    border = np.zeros_like(mask)
    border[:, -2:] = True  # the mask reaches the right side: there the line has to lie inside
    assert colored[20 * 3, -1]
    np.testing.assert_array_equal(outlined[mask & ~border], plain[mask & ~border])
    changed = (outlined != plain).any(axis=2)
    assert changed.mean() < 0.04
    for column in (1, 2):
        np.testing.assert_array_equal(
            np.asarray(picture_cells(grid)[0][column]), grid.rows[0][column].repeat(3, axis=0).repeat(3, axis=1)
        )


def test_large_and_oblong_pictures_are_reduced_by_a_whole_factor():
    picture = np.full((1000, 1500, 3), 77, np.uint8)
    grid = PictureGrid(["a"], [[picture]], [""], [np.ones((1000, 1500), bool)])
    cell = picture_cells(grid)[0][0]
    assert cell.size == (500, 334)
    assert cell.getpixel((250, 167)) == (77, 77, 77)
    assert cell.getpixel((0, 0)) == OUTLINE


def test_the_grid_holds_every_picture_in_its_place():
    grid = make_grid()
    page = np.asarray(Image.open(io.BytesIO(picture_grid(grid))))
    cells = [np.asarray(cell) for row in picture_cells(grid) for cell in row]
    places = []
    for cell in cells:
        corners = np.argwhere((page == cell[0, 0]).all(axis=2))
        found = [(y, x) for y, x in corners if np.array_equal(page[y : y + 192, x : x + 192], cell)]
        assert len(found) == 1
        places.append(tuple(map(int, found[0])))
    assert places == sorted(places)
    assert len({y for y, _ in places}) == 2
    assert len({x for _, x in places}) == 3
    top = places[0][0]
    assert (page[:top] < 100).any()  # the columns' names are written
    below = page[top + 192 : places[3][0]]
    assert (below < 200).any()  # so is the prompt
    without = dataclasses.replace(grid, captions=["", ""])
    assert Image.open(io.BytesIO(picture_grid(without))).size[1] < page.shape[0]


def test_a_contact_sheet_holds_every_picture_outlined_with_its_caption():
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 200, (side, 64, 3), dtype=np.uint8) for side in (64, 64, 48, 64, 64)]
    masks = [np.zeros(picture.shape[:2], bool) for picture in pictures]
    for mask in masks:
        mask[10:30, 20:40] = True
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(pictures, masks, ["a word", *["word " * 40] * 4]))))
    for picture in pictures:
        inner = picture[12:28, 22:38].repeat(2, axis=0).repeat(2, axis=1)
        corners = np.argwhere((sheet == inner[0, 0]).all(axis=2))
        places = [(y, x) for y, x in corners if np.array_equal(sheet[y : y + 32, x : x + 32], inner)]
        assert len(places) == 1
        y, x = places[0]
        assert (sheet[y - 5, x : x + 32] == OUTLINE).all()
    assert 3 * 128 < sheet.shape[1] < 3 * 160
    assert contact_sheet(pictures, masks, [""] * 5) == contact_sheet(pictures, masks, [""] * 5)


def broken_grid(**changes):
    return make_data(pictures={"grid.png": dataclasses.replace(make_grid(), **changes)})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: make_data(tables=[Table("Quality", ["Row", "PSNR"], [["a", "1"], ["b"]])]),
            "row 1 of table 'Quality'",
        ),
        (lambda: broken_grid(columns=["Original"]), "picture row 0 has 3 pictures for 1 columns"),
        (lambda: broken_grid(captions=["one"]), "1 captions"),
        (lambda: broken_grid(masks=[None]), "1 masks"),
        (lambda: broken_grid(masks=[np.ones((8, 8), bool), None]), "the mask of row 0"),
        (lambda: broken_grid(masks=[np.ones((64, 64)), None]), "the mask of row 0 is float64"),
        (lambda: broken_grid(rows=[[np.zeros((8, 8, 3))] * 3] * 2), "not a uint8 array"),
        (lambda: broken_grid(rows=[[np.zeros((8, 8), np.uint8)] * 3] * 2), "shape (8, 8)"),
        (lambda: broken_grid(rows=[]), "at least one column and one row"),
        (lambda: broken_grid(outlined_column=3), "column 3 cannot be outlined"),
        (lambda: make_data(curves=[Curve("c", {"x": ([0, 1], [1.0])})]), "series 'x' of curve 'c'"),
    ],
)
def test_data_that_do_not_fit_are_refused_and_nothing_is_written(make, says, tmp_path):
    with pytest.raises(InvalidInputError) as refusal:
        write_report(tmp_path / "report.html", make())
    assert says in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def axes_of(curve):
    figure = draw(curve)
    figure.canvas.draw()
    return figure.axes[0]


def labels(axis):
    return [label.get_text() for label in axis.get_majorticklabels()]


def test_a_line_runs_through_its_values_and_axes_hold_them():
    axes = axes_of(Curve("c", {"x": ([0, 50, 100], [1.0, 3.0, 2.0]), "y": ([10], [2.0])}))
    line, one = axes.lines
    np.testing.assert_array_equal(line.get_xydata(), [[0, 1], [50, 3], [100, 2]])
    np.testing.assert_array_equal(one.get_xydata(), [[10, 2]])
    assert axes.get_xlim()[0] <= 0 < 100 <= axes.get_xlim()[1]
    assert axes.get_ylim()[0] <= 1 < 3 <= axes.get_ylim()[1]
    assert {"0", "25", "50", "75", "100"} <= set(labels(axes.xaxis))
    assert axes_of(Curve("c", {"x": ([1, 2], [0.2, 3.0])})).get_ylim()[0] == 0


def test_a_few_points_are_dots_and_one_alone_is_seen():
    axes = axes_of(Curve("c", {"few": ([0, 100], [1.0, 2.0]), "one": ([50], [1.5]), "many": (range(99), np.ones(99))}))
    assert [line.get_marker() for line in axes.lines] == ["o", "o", "None"]
    assert plot(Curve("c", {"one": ([50], [1.5])})).svg.count("<use ") == 1


def test_a_log_axis_is_logarithmic_and_says_what_it_left_out():
    curve = Curve("c", {"x": ([0, 1, 2, 3, 4], [1.0, 0.1, 0.0, np.nan, 0.001])}, log_y=True)
    axes = axes_of(curve)
    assert axes.get_yscale() == "log"
    assert axes.lines[0].get_ydata().tolist() == [1.0, 0.1, 0.001]
    assert {"0.001", "0.01", "0.1", "1"} <= set(labels(axes.yaxis))
    assert plot(curve).notes == ["2 values that cannot be drawn are left out."]


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(
    "values", [[5.0], [3.0, 3.0], [1.0, 1.02], [1e-8, 1e8], [0.5, 0.7, 0.65], [0.0, 0.0], [-3.0, 2.0], [np.nan], []]
)
def test_every_range_of_values_can_be_drawn(values, log_y):
    drawn = plot(Curve("c", {"x": (range(len(values)), values)}, log_y=log_y))
    drawable = [v for v in values if np.isfinite(v) and (v > 0 or not log_y)]
    assert bool(drawn.lines) == bool(drawable) == bool(drawn.svg)
    numbers = [float(number) for number in re.findall(r"[ML] (\S+) \S+", drawn.svg)]
    assert np.isfinite(numbers).all()
    assert len(re.findall(r"<text[^>]*text-anchor: end[^>]*>[^<]+<", drawn.svg)) >= 2 * bool(drawable)


def test_a_long_line_is_thinned_without_losing_a_spike_and_its_mean_is_smooth():
    values = np.sin(np.arange(50_000)) + 2.0
    values[31_234] = 40.0
    curve = Curve("c", {"x": (np.arange(50_000), values)})
    drawn = plot(curve)
    assert len(drawn.svg) < 60_000
    heights = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", drawn.svg)]
    assert min(heights[10:]) < 20  # of 180, from the top: the spike
    noisy, mean = axes_of(curve).lines
    assert np.ptp(mean.get_ydata()) < 0.05 * np.ptp(noisy.get_ydata())
    assert float(drawn.lines[0].last) == pytest.approx(2.0, abs=0.02)
    np.testing.assert_allclose(mean.get_ydata()[0], values[:501].mean())


def test_a_plot_holds_text_as_text_the_colours_of_the_page_and_no_other_document():
    many = {f"{i} $x_1$": ([0, 1], [i + 1.0, 2.0]) for i in range(9)}
    svg = plot(Curve("c", {"a <b>": ([0, 20_000], [1.0, 2.0])})).svg
    assert "var(--c0)" in svg
    assert ">20k</text>" in svg
    assert re.findall(r"https?:|url\(|<style|<metadata|#[0-9a-f]{6}|<b>", svg) == []
    assert len({line.color for line in plot(Curve("c", many)).lines}) == 9


def write_log(path, *lines):
    path.write_text("\n".join(lines))
    return path


def test_a_log_is_read_back(tmp_path):
    records = [
        {"step": 10, "loss": 1.5, "feature_loss/00": 0.25, "learning_rate": 1e-4, "note": "warm", "done": False},
        {"step": 20, "loss": 1.0, "feature_loss/00": float("nan")},
        {"step": 30, "loss": 0.5, "seconds": 12},
    ]
    log = read_metrics_jsonl(write_log(tmp_path / "metrics.jsonl", *map(json.dumps, records), ""))
    assert list(log) == ["loss", "feature_loss/00", "learning_rate", "seconds"]
    steps, values = log["loss"]
    assert steps.dtype == np.int64
    assert values.dtype == np.float64
    assert (steps.tolist(), values.tolist()) == ([10, 20, 30], [1.5, 1.0, 0.5])
    np.testing.assert_array_equal(log["feature_loss/00"][1], [0.25, np.nan])
    assert [part.tolist() for part in log["seconds"]] == [[30], [12.0]]


def test_a_resumed_log_counts_each_step_once_with_its_later_values(tmp_path):
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in [(1, 9.0), (2, 8.0), (3, 7.0), (2, 5.0)]]
    steps, values = read_metrics_jsonl(write_log(tmp_path / "m.jsonl", *lines))["loss"]
    assert (steps.tolist(), values.tolist()) == ([1, 2, 3], [9.0, 5.0, 7.0])


def test_a_line_cut_by_a_kill_is_left_out_and_any_other_bad_line_is_damage(tmp_path):
    good = json.dumps({"step": 1, "loss": 2.0})
    log = read_metrics_jsonl(write_log(tmp_path / "m.jsonl", good, good[:-5]))
    assert log["loss"][0].tolist() == [1]
    for bad in (good[:-5], "[1, 2]", '{"loss": 1.0}', '{"step": 1.5}', '{"step": true}', "3"):
        with pytest.raises(DamagedError, match=r"line 2 of .*m\.jsonl"):
            read_metrics_jsonl(write_log(tmp_path / "m.jsonl", good, bad, good, ""))
    with pytest.raises(InvalidInputError, match="no training log"):
        read_metrics_jsonl(tmp_path / "absent.jsonl")
    assert read_metrics_jsonl(write_log(tmp_path / "m.jsonl", "")) == {}
