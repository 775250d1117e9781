"""Laws of the people's decisions: what counts, what an undo takes back, and that no line is ever lost."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_control.errors import DamagedError, InvalidInputError, StorageError
from refine_control.photos.decisions import (
    ACCEPT,
    EDIT,
    REJECT,
    UNDO,
    Decision,
    DecisionLog,
    append_decision,
    by_reviewer,
    decide,
    id_of,
    read_decisions,
)
from refine_control.records import Entry

DAY = "2025-01-31T12:{:02}:00+00:00"


def said(id: str, action: str, reviewer: str = "ann", prompt: str | None = None, minute: int = 0) -> Decision:
    return Decision(id, action, prompt, reviewer, DAY.format(minute))


def written(folder: Path, *decisions: Decision) -> Path:
    for each in decisions:
        append_decision(folder / "d.jsonl", each)
    return folder / "d.jsonl"


def test_what_is_written_is_read_and_the_last_line_of_a_reviewer_is_the_decision(tmp_path):
    first, last = said("a", REJECT, minute=2), said("a", EDIT, prompt='ein Kürbis \u2028 "q"', minute=1)
    path = written(tmp_path, first, said("b", ACCEPT), last)
    assert read_decisions(path) == {"a": last, "b": said("b", ACCEPT)}
    assert by_reviewer(path) == {"ann": {"a": last, "b": said("b", ACCEPT)}}
    assert len(path.read_bytes().splitlines()) == 3
    assert read_decisions(tmp_path / "none.jsonl") == {}


def test_of_reviewers_the_latest_time_counts_and_of_equal_times_the_later_line(tmp_path):
    late, early = said("a", REJECT, "ann", minute=9), said("a", ACCEPT, "bob", minute=3)
    path = written(tmp_path, late, early)
    assert read_decisions(path)["a"] == late
    tie = said("a", EDIT, "cy", "x", minute=9)
    assert read_decisions(written(tmp_path, tie))["a"] == tie
    other_zone = Decision("a", ACCEPT, None, "dee", "2025-01-31T14:10:00+02:00")  # 12:10 in UTC
    assert read_decisions(written(tmp_path, other_zone))["a"] == other_zone


def test_reviewers_disagree_by_action_or_words_and_not_by_time(tmp_path):
    path = written(
        tmp_path,
        *(said(id, ACCEPT, "ann") for id in "abc"),
        said("a", ACCEPT, "bob", minute=5),
        said("b", REJECT, "bob"),
        said("d", EDIT, "ann", "an owl"),
        said("d", EDIT, "bob", "an old owl"),
        said("e", EDIT, "ann", "an owl"),
        said("e", EDIT, "bob", "an owl", minute=7),
    )
    assert {id for id in "abcd" if DecisionLog(path).disagree(id)} == {"b", "d"}
    path = written(tmp_path, said("b", UNDO, "bob"))
    assert {id for id in "abcd" if DecisionLog(path).disagree(id)} == {"d"}


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(["x", "y"]), st.sampled_from([ACCEPT, REJECT, UNDO])),
        max_size=9,
    )
)
def test_each_undo_takes_back_one_decision_of_that_reviewer_on_that_row(tmp_path_factory, told):
    path = written(tmp_path_factory.mktemp("undo"), *(said(id, action, who) for id, who, action in told))
    stacks: dict[tuple[str, str], list[str]] = {}
    for id, who, action in told:
        stack = stacks.setdefault((who, id), [])
        if action == UNDO:
            del stack[-1:]
        else:
            stack.append(action)
    standing = {(who, id): each.action for who, rows in by_reviewer(path).items() for id, each in rows.items()}
    assert standing == {key: stack[-1] for key, stack in stacks.items() if stack}
    assert set(read_decisions(path)) == {id for (_, id) in standing}


@settings(max_examples=25)
@given(cut=st.integers(0, 10**6), ending=st.sampled_from([b"", b"\n"]))
def test_a_line_cut_by_a_kill_is_passed_over_and_closed_by_the_next_append(tmp_path_factory, cut, ending):
    path = written(tmp_path_factory.mktemp("cut"), said("a", ACCEPT), said("ü", EDIT, prompt="日本 owl"))
    data = path.read_bytes()
    start = data[:-1].rfind(b"\n") + 1
    place = start + cut % (len(data) - start)
    path.write_bytes(data[:place])
    before = read_decisions(path)
    whole = place == len(data) - 1  # only the line's end is missing: nothing of it is lost
    assert set(before) == ({"a", "ü"} if whole else {"a"})
    append_decision(path, said("c", REJECT))
    assert read_decisions(path) == {**before, "c": said("c", REJECT)}
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "\ufffd",
        '{"id": "a"}',
        '{"id": "a", "action": "maybe", "prompt": null, "reviewer": "x", "time": "2025-01-31T12:00:00Z"}',
        '{"id": "a", "action": "edit", "prompt": null, "reviewer": "x", "time": "2025-01-31T12:00:00Z"}',
        '{"id": "a", "action": "accept", "prompt": null, "reviewer": "x", "time": "2025-01-31T12:00:00"}',
        '{"id": [3], "action": "accept", "prompt": null, "reviewer": "x", "time": "2025-01-31T12:00:00Z"}',
        '{"id": 3.5, "action": "accept", "prompt": null, "reviewer": "x", "time": "2025-01-31T12:00:00Z"}',
        '{"id": true, "action": "accept", "prompt": null, "reviewer": "x", "time": "2025-01-31T12:00:00Z"}',
    ],
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line):
    path = written(tmp_path, said("a", ACCEPT))
    path.write_bytes(path.read_bytes() + b"\n" + line.encode("utf-8") + b"\n")
    append_decision(path, said("b", ACCEPT))
    with pytest.raises(DamagedError, match=r"line 3 of .*d\.jsonl"):
        read_decisions(path)


def test_the_prompt_of_anything_but_an_edit_is_not_a_new_text(tmp_path):
    line = {"id": "a", "action": "accept", "prompt": "as it was", "reviewer": "x", "time": "2025-01-31T12:00:00Z"}
    (tmp_path / "d.jsonl").write_text(json.dumps(line) + "\n")
    assert read_decisions(tmp_path / "d.jsonl")["a"].prompt is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"action": "approve"}, "'approve'"),
        ({"time": "2025-01-31"}, "'2025-01-31' is not a time"),
        ({"reviewer": None}, "name of its reviewer"),
        ({"time": ...}, "no `time`"),
    ],
    ids=str,
)
def test_a_line_of_another_tool_is_refused_with_what_is_wrong(tmp_path, change, said):
    row = {"id": "a", "action": ACCEPT, "prompt": None, "reviewer": "x", "time": "2025-01-31T12:00:00Z", **change}
    (tmp_path / "d.jsonl").write_text(json.dumps({k: v for k, v in row.items() if v is not ...}) + "\n")
    with pytest.raises(DamagedError, match=rf"line 1 of .*{said}"):
        read_decisions(tmp_path / "d.jsonl")


@pytest.mark.parametrize("id", [3, 3.0])
def test_ids_that_are_numbers_and_a_byte_order_mark_are_read(tmp_path, id):
    row = {"id": id, "action": ACCEPT, "prompt": None, "reviewer": "x", "time": "2025-01-31T12:00:00Z"}
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\r\n", "utf-8-sig")
    assert read_decisions(tmp_path / "d.jsonl")["3"].action == ACCEPT


def test_decisions_are_refused_that_say_nothing():
    for wrong in ({"action": "x"}, {"id": " "}, {"reviewer": ""}, {"time": "noon"}, {"action": EDIT}, {"prompt": "x"}):
        fields = {"id": "a", "action": ACCEPT, "prompt": None, "reviewer": "ann", "time": DAY.format(0), **wrong}
        with pytest.raises(InvalidInputError):
            Decision(**fields)
    made = decide("a", EDIT, " ann  b ", " an\nowl ")
    assert (made.prompt, made.reviewer) == ("an owl", "ann b")
    assert decide("a", REJECT, "ann", "words").prompt is None


def test_a_row_is_known_by_its_own_id_or_its_key():
    bare = Entry("key-1", Path(), "a.jpg", None, None)
    assert id_of(bare) == "key-1"
    assert [id_of(Entry("k", Path(), "a", None, None, meta={"id": id})) for id in ("r", 7, "")] == ["r", "7", "k"]


def test_a_log_reads_on_where_it_ended(tmp_path):
    log = DecisionLog(written(tmp_path, said("a", ACCEPT)))
    written(tmp_path, said("a", REJECT, "bob", minute=4), said("b", ACCEPT))
    assert log.ids() == ["a"]
    log.refresh()
    assert (log.ids(), log.disagree("a"), log.reviewers()) == (["a", "b"], True, {"ann", "bob"})
    assert log.counting("a") == said("a", REJECT, "bob", minute=4)
    assert log.latest_by("ann", among={"a", "b"}) == said("b", ACCEPT)
    assert log.latest_by("ann", among={"a"}) == said("a", ACCEPT)
    assert log.latest_by("cy", among={"a"}) is None
    log.path.write_bytes(b"")  # another file took its place
    log.refresh()
    assert log.ids() == []


PROGRAM = """
import sys, threading
from pathlib import Path
from refine_control.photos.decisions import append_decision, decide
def work(thread):
    for number in range(25):
        append_decision(Path(sys.argv[1]), decide(f"{sys.argv[2]}-{thread}-{number}", "edit", "ann", "x" * 300))
threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
[each.start() for each in threads]; [each.join() for each in threads]
"""


def test_threads_and_processes_append_at_once_and_lose_nothing(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"id": "torn')
    started = [subprocess.Popen([sys.executable, "-c", PROGRAM, str(path), str(n)]) for n in range(2)]
    threads = [
        threading.Thread(target=lambda n=n: [append_decision(path, said(f"me-{n}-{k}", ACCEPT)) for k in range(25)])
        for n in range(2)
    ]
    for thread in threads:
        thread.start()
    assert [each.wait() for each in started] == [0, 0]
    for thread in threads:
        thread.join()
    assert len(read_decisions(path)) == 2 * 2 * 25 + 2 * 25


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = written(tmp_path, said("a", ACCEPT))
    before, write = path.read_bytes(), os.write
    room = [20]

    def stingy(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        done = write(descriptor, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", stingy)
    with pytest.raises(StorageError, match="No space left"):
        append_decision(path, said("b", ACCEPT))
    assert path.read_bytes() == before
