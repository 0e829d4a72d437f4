"""The journal: nothing lost, nothing twice, no configuration mixed in."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from axolotl_mote.builder.clients.calls import Call, Completion
from axolotl_mote.builder.loop.journal import Journal, JournalError
from axolotl_mote.builder.settings import config_hash
from axolotl_mote.files import FileInUseError

CALL = Call("q1", "response", 0, 0, [], 7)
OTHER = Call("q2", "response", 0, 0, [], 8)
DONE = Completion("line\nbreak \u2028 and \ud800 surrogate", "stop", 3, 4, "m")
IDENTITY = {"seed": 1, "stages": {"check": {"temperature": 0.0}}}


def test_what_was_added_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, IDENTITY) as journal:
        assert journal.get(CALL) is None
        journal.add([(CALL, DONE)])
        journal.add([(CALL, Completion("another", "stop"))])
    with Journal(path, IDENTITY) as journal:
        assert journal.get(CALL) == DONE
        assert dict(journal.completions()) == {"q1/response.0.0": DONE}
    assert len(path.read_text().splitlines()) == 2
    assert json.loads(path.read_text().splitlines()[1])["seed"] == 7


def test_a_long_journal_shows_how_far_it_is_read(tmp_path: Path) -> None:
    calls = [Call(f"q{number}", "response", 0, 0, [], number) for number in range(2500)]
    with Journal(tmp_path / "j.jsonl", IDENTITY) as journal:
        journal.add((call, DONE) for call in calls)
    seen: list[int] = []
    Journal(tmp_path / "j.jsonl", IDENTITY, on_progress=seen.append).close()
    assert seen == [1000, 2000]


@pytest.mark.parametrize("keep", [0, 1, 5, 30])
def test_every_torn_last_line_is_cut_off(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, IDENTITY) as journal:
        journal.add([(CALL, DONE)])
        whole = path.read_bytes()
        journal.add([(OTHER, DONE)])
    torn = path.read_bytes()[: len(whole) + keep]
    path.write_bytes(torn)
    with Journal(path, IDENTITY) as journal:
        assert path.read_bytes() == whole
        assert journal.get(CALL) == DONE
        assert journal.get(OTHER) is None
        journal.add([(OTHER, DONE)])
    with Journal(path, IDENTITY) as journal:
        assert journal.get(OTHER) == DONE


def test_a_record_of_another_configuration_is_refused(tmp_path: Path) -> None:
    """As in two journals that somebody put together."""
    mine, foreign = tmp_path / "mine.jsonl", tmp_path / "foreign.jsonl"
    for path, identity in ((mine, IDENTITY), (foreign, {**IDENTITY, "seed": 2})):
        with Journal(path, identity) as journal:
            journal.add([(CALL, DONE)])
    with mine.open("ab") as file:
        file.write(foreign.read_bytes().splitlines(keepends=True)[1])
    with pytest.raises(JournalError, match="must hold records of one configuration"):
        Journal(mine, IDENTITY)


def test_a_torn_first_line_begins_a_new_journal(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"journal": 1, "conf')
    with Journal(path, IDENTITY) as journal:
        journal.add([(CALL, DONE)])
    with Journal(path, IDENTITY) as journal:
        assert journal.get(CALL) == DONE


def test_damage_elsewhere_is_an_error_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    Journal(path, IDENTITY).close()
    path.write_bytes(path.read_bytes() + b"{damaged\n" + b"{}\n")
    with pytest.raises(JournalError, match="line 2 is damaged"):
        Journal(path, IDENTITY)


def test_a_changed_configuration_is_named_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    Journal(path, IDENTITY).close()
    with pytest.raises(JournalError, match=r"stages\.check\.temperature: 0\.0 -> 0\.5"):
        Journal(path, {"seed": 1, "stages": {"check": {"temperature": 0.5}}})
    Journal(path, IDENTITY).close()  # the refusal left no lock behind


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, IDENTITY), pytest.raises(FileInUseError, match="one process at a time"):
        Journal(path, IDENTITY)


def test_old_journals_are_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, IDENTITY, restart=True) as journal:
        assert journal.set_aside is None
    for expected in ("journal.1.jsonl", "journal.2.jsonl"):
        path.write_text(f"{expected}\n")
        with Journal(path, IDENTITY, restart=True) as journal:
            aside = journal.set_aside
            assert aside is not None
            assert aside.read_text().strip() == aside.name == expected
            assert journal.get(CALL) is None


def test_a_journal_written_before_is_read(tmp_path: Path) -> None:
    """Lines as the first versions wrote them: ASCII, with the seed."""
    path = tmp_path / "journal.jsonl"
    path.write_text(
        '{"journal": 1, "config": "CONFIG", "identity": {"seed": 1, "stages": {"check": {"temperature": 0.0}}}}\n'
        '{"config": "CONFIG", "call": "q1/response.0.0", "seed": 7, "text": "line\\nbreak \\u2028 and \\ud800 '
        'surrogate", "finish": "stop", "prompt_tokens": 3, "completion_tokens": 4, "model": "m"}\n'.replace(
            "CONFIG", config_hash(IDENTITY)
        )
    )
    with Journal(path, IDENTITY) as journal:
        assert journal.get(CALL) == DONE


def test_a_full_disk_leaves_neither_half_a_line_nor_a_call_that_counts_as_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, IDENTITY) as journal:
        whole = path.read_bytes()
        write = os.write
        with monkeypatch.context() as full:
            full.setattr(os, "write", lambda fd, data: write(fd, data[:5]) and _raise(OSError(28, "disk full")))
            with pytest.raises(OSError, match="disk full"):
                journal.add([(CALL, DONE)])
        assert path.read_bytes() == whole
        assert journal.get(CALL) is None
        journal.add([(CALL, DONE)])
    with Journal(path, IDENTITY) as journal:
        assert journal.get(CALL) == DONE


def _raise(error: Exception) -> int:
    raise error


def test_a_journal_in_use_is_not_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, IDENTITY) as journal:
        with pytest.raises(FileInUseError, match="one process at a time"):
            Journal(path, IDENTITY, restart=True)
        journal.add([(CALL, DONE)])
    assert [file.name for file in tmp_path.iterdir()] == ["journal.jsonl"]
    with Journal(path, IDENTITY, restart=True) as journal, pytest.raises(FileInUseError, match="one process at a time"):
        Journal(path, IDENTITY)
