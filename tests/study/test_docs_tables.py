"""The tables in the documents are those of the finished rows under results/."""

import shutil
from pathlib import Path

import pytest

from refine_control.errors import InvalidInputError
from refine_control.study import docs_tables
from refine_control.study.docs_tables import doc_table, doc_tables, rewrite

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "before\n<!-- table: cost -->\nold\n<!-- end -->\nafter\n"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_of_a_document_are_those_of_the_results(path):
    text = path.read_text()
    assert rewrite(text, ROOT / "results") == text, "run `make docs`"


def test_a_marked_table_is_computed_from_the_finished_rows(monkeypatch, tmp_path):
    text = rewrite(TEXT, ROOT / "results")
    assert text.startswith("before\n<!-- table: cost -->\n\n| layers |")
    assert "| 12 | 1,877,760 | 53 | 0.362 | 76 |\n" in text
    assert text.endswith("|\n\n<!-- end -->\nafter\n")
    assert rewrite(text, ROOT / "results") == text
    path = tmp_path / "page.md"
    path.write_text(TEXT)
    monkeypatch.setattr(docs_tables, "RESULTS", ROOT / "results")
    monkeypatch.chdir(ROOT)
    docs_tables.main([str(path)])
    assert path.read_text() == text


def test_a_wrong_marker_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InvalidInputError, match="there is no table costs for documents; the names are headline, cost"):
        rewrite(TEXT.replace("cost", "costs"))
    for text in (TEXT.replace("<!-- end -->\n", ""), TEXT.replace("<!-- end -->", "<!-- table: headline -->")):
        with pytest.raises(InvalidInputError, match="the table cost of the document has no line <!-- end -->"):
            rewrite(text, ROOT / "results")
    with pytest.raises(InvalidInputError, match="has no finished rows of cost"):
        doc_table("cost", tmp_path)
    (tmp_path / "page.md").write_text(TEXT.replace("cost", "costs"))
    with pytest.raises(SystemExit, match=r"page\.md: there is no table costs"):
        docs_tables.main([str(tmp_path / "page.md")])


def test_a_table_of_differences_marks_what_excludes_zero():
    lines = doc_table("table3_photos_differences", ROOT / "results").splitlines()
    ssd = next(line for line in lines if "`ssd`" in line)
    assert ssd == "| Student_ssd (`ssd`) | 3 | **0.03 [0.00, 0.06]** | **0.03 [0.00, 0.06]** | **1.2 [0.4, 1.9]** |"
    one_stage = next(line for line in lines if "`one_stage`" in line)
    assert "| -0.04 [-0.10, 0.02] |" in one_stage


def test_every_target_with_finished_rows_has_tables():
    names = set(doc_tables())
    assert {"headline", "cost", "figure2", "figure2_long", "table1_long", "table1_photos", "table3_photos"} <= names
    assert {"table1", "table3", "layers", "split", "init", "losses", "data", "prompts", "scarce", "parts"} <= names


def test_the_table_of_conditions_has_shares_of_the_teachers_and_only_whole_studies(tmp_path):
    lines = doc_table("halved", ROOT / "results").splitlines()
    canny = next(line for line in lines if line.startswith("| canny |"))
    of_its_own = next(line for line in doc_table("conditions_canny", ROOT / "results").splitlines() if "`fc`" in line)
    assert canny.split(" | ")[4] in of_its_own
    folder = tmp_path / "mini" / "conditions" / "canny"
    shutil.copytree(ROOT / "results" / "mini" / "conditions" / "canny", folder)
    (folder / "balanced-0.json").unlink()
    for seed in (1, 2):
        (folder / f"balanced-{seed}.json").unlink(missing_ok=True)
    assert doc_table("halved", tmp_path).count("\n") == 1  # the headings alone
