"""JSON lines, atomic writes and the append-only log: torn files, hostile text, full disks, a second process."""

from __future__ import annotations

import errno
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from axolotl_mote.files import (
    AppendLog,
    AtomicFiles,
    FileInUseError,
    RowFault,
    RowSpool,
    folder_digest,
    folder_in_one_rename,
    json_line,
    parse_row,
    raise_faults,
    read_all_rows,
    read_jsonl,
    sound_rows,
    write_atomically,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=[])), JSON, max_size=4))
def test_any_row_is_one_line_and_comes_back(row: dict[str, Any]) -> None:
    """Line separators of every kind and unpaired surrogates included."""
    line = json_line(row)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert json.loads(line) == row


def test_rows_are_numbered_from_one_and_faults_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{oops\n[1]\n{"b": "caf\xe9"}\n' + b"[" * 100_000 + b'\n{"c": "\xe2\x80\xa8"}')
    found = list(read_jsonl(path))
    assert [number for number, _ in found] == [1, 3, 4, 5, 6, 7]
    assert [row for _, row in found if not isinstance(row, RowFault)] == [{"a": 1}, {"c": "\u2028"}]
    faults = [row for _, row in found if isinstance(row, RowFault)]
    assert faults[0].startswith("the line must be JSON; got Expecting property name")
    assert faults[1] == "the line must hold a JSON object; got list. Write one object per line."
    assert faults[2] == "the line must be UTF-8; got byte 0xe9. Convert the file."
    assert "JSON" in faults[3]
    with pytest.raises(ValueError, match=r"rows\.jsonl must hold one JSON object per line; got 4 faults\.\n  row 3: "):
        list(read_all_rows(path))


def test_a_compressed_file_is_read_through_its_opener(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    assert [row for _, row in read_jsonl(path, gzip.open)] == [{"a": 1}, {"a": 2}]


def test_a_long_list_of_faults_is_cut_and_counted() -> None:
    with pytest.raises(ValueError, match="mine holds 60 faults") as raised:
        raise_faults([str(number) for number in range(60)], "mine holds {faults}; none of {them} is read.")
    shown = str(raised.value).splitlines()
    assert len(shown) == 52
    assert shown[-1] == "  and 10 more"


def test_sound_rows_are_yielded_before_all_faults_are_raised(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n[]\n{"a": 2}\n{"a": -1}\n')
    rows = sound_rows(read_jsonl(path), "mine: {faults}.", lambda row: ["a is negative"] * (row["a"] < 0))
    assert [next(rows), next(rows)] == [(1, {"a": 1}), (3, {"a": 2})]
    with pytest.raises(ValueError, match=r"^mine: 2 faults\.\n  row 2: the line must .*\n  row 4: a is negative$"):
        next(rows)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    for text in ("first", "second"):
        with folder_in_one_rename(target, replace=True) as staging:
            (staging / "file").write_text(text)
        assert (target / "file").read_text() == text
    with pytest.raises(FileNotFoundError), folder_in_one_rename(target, replace=True) as staging:
        (staging / "none" / "file").write_text("third")
    with pytest.raises(OSError, match="not empty"), folder_in_one_rename(target) as staging:
        (staging / "file").write_text("fourth")
    assert (target / "file").read_text() == "second"
    assert list(target.parent.iterdir()) == [target]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_every_row_gets_every_column(tmp_path: Path) -> None:
    with RowSpool(tmp_path) as rows, AtomicFiles() as files:
        for row in ({"a": 1}, {"b": "\ud800"}):
            rows.append(row)
        files.write_jsonl(tmp_path / "rows.jsonl", rows)
    assert list(read_all_rows(tmp_path / "rows.jsonl")) == [{"a": 1, "b": None}, {"a": None, "b": "?"}]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.text(st.characters(exclude_categories=[])), JSON, max_size=4), max_size=5))
def test_a_spool_gives_back_any_row_in_any_order(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    with RowSpool(tmp_path) as spool:
        assert list(tmp_path.iterdir()) == []
        for number, row in enumerate(rows):
            spool.append(row)
            assert spool[number // 2] == rows[number // 2]
        assert list(spool) == rows
        assert len(spool) == len(rows)
        assert list(spool.columns) == list(dict.fromkeys(key for row in rows for key in row))


def test_a_row_nested_as_deeply_as_can_be_read_is_written_or_refused_in_words(tmp_path: Path) -> None:
    outcomes = set()
    for depth in range(800, 1001):
        row = parse_row(b'{"a": ' + b"[" * depth + b"]" * depth + b"}")
        if isinstance(row, RowFault):
            outcomes.add("not read")
            continue
        try:
            json_line(row)
        except ValueError as error:
            assert "nested too deeply" in str(error)  # noqa: PT017
            outcomes.add("refused")
        else:
            outcomes.add("written")
    assert outcomes >= {"written", "not read"}
    deep: list[Any] = []
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(ValueError, match=r"a row must hold JSON; got brackets that are nested too deeply"):
        json_line({"a": deep})


def interrupted(chunk: bytes) -> Iterator[bytes]:
    yield chunk
    raise KeyboardInterrupt


def test_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one", "two")]
    for text in (b"first", b"second"):
        with AtomicFiles() as files:
            for path in paths:
                files.write(path, [text, b"."])
                assert not path.exists() or path.read_bytes() != b"second."
    with pytest.raises(KeyboardInterrupt), AtomicFiles() as files:
        files.write(paths[0], interrupted(b"third"))
    assert sorted(tmp_path.iterdir()) == paths
    assert [path.read_bytes() for path in paths] == [b"second."] * 2


def test_every_writer_names_the_path_if_the_disk_is_full_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").write_text("old")
    log = AppendLog(tmp_path / "log.jsonl")
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left on device: '.*/old'"):
        write_atomically(tmp_path / "old", "new")
    with pytest.raises(OSError, match=r"No space left on device: '.*/log\.jsonl'"), log:
        log.append([{"a": 1}])
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/folder'"),
        folder_in_one_rename(tmp_path / "folder"),
    ):
        os.fsync(0)
    with pytest.raises(OSError, match=r"^no such host$"), folder_in_one_rename(tmp_path / "folder"):
        raise OSError("no such host")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"old": "old", "log.jsonl": ""}


def test_a_spool_on_a_full_disk_names_its_folder(tmp_path: Path) -> None:
    with RowSpool(tmp_path) as spool, open("/dev/full", "r+b", buffering=0) as full:
        os.dup2(full.fileno(), spool._file.fileno())
        with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}'"):
            spool.append({"text": "x" * 2**17})


# --- the append-only log --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2000, 2048, 5000])
def test_lines_are_found_by_their_offsets(tmp_path: Path, length: int) -> None:
    with AppendLog(tmp_path / "log.jsonl") as log:
        rows = [{"n": n, "text": "x" * length} for n in range(5)]
        offsets = log.append(rows[:3]) + log.append(rows[3:])
        assert [log.line_at(offset) for offset in reversed(offsets)] == [json_line(row) for row in reversed(rows)]


def held(path: Path) -> list[bytes]:
    with AppendLog(path) as log:
        return [line for _, line in log.lines()]


@pytest.mark.parametrize("whole", [0, 1, 3])
@pytest.mark.parametrize("torn", [0, 1, 70_000])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, whole: int, torn: int) -> None:
    path = tmp_path / "folder" / "log.jsonl"
    path.parent.mkdir()
    lines = [json_line({"row": number}) for number in range(whole)]
    path.write_bytes(b"".join(lines) + b"x" * torn)
    with AppendLog(path) as log:
        assert log.torn == bool(torn)
        assert list(log.lines()) == list(enumerate(lines, start=1))
        log.append([{"row": "next"}])
    assert held(path) == [*lines, json_line({"row": "next"})]


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    code = f"from pathlib import Path; from axolotl_mote.files import AppendLog; AppendLog(Path({str(path)!r}))"
    with AppendLog(path) as log:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert "FileInUseError" in done.stderr
        assert "log.jsonl must be used by one process at a time" in done.stderr
        with pytest.raises(FileInUseError):
            AppendLog(path, clear=True)
        log.append([{"a": 1}])
    assert held(path) == [b'{"a": 1}\n']
    AppendLog(path, clear=True).close()
    assert held(path) == []


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    write = os.write

    def half(fd: int, data: Any) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[: len(data) // 2])

    with AppendLog(path) as log:
        log.append([{"a": 1}])
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space left"):
            log.append([{"text": "x" * 100}])
        monkeypatch.undo()
        log.append([{"a": 2}])
    assert held(path) == [b'{"a": 1}\n', b'{"a": 2}\n']


def test_killed_at_any_moment_only_whole_lines_remain(tmp_path: Path) -> None:
    """kill -9 while lines of 1 MB are written: what `append` has returned for is there."""
    path = tmp_path / "log.jsonl"
    code = (
        f"from pathlib import Path; from axolotl_mote.files import AppendLog\n"
        f"log = AppendLog(Path({str(path)!r}))\n"
        "for n in range(10_000):\n    log.append([{'n': n, 'text': 'x' * 1_000_000}]); print(n, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(3)]
        process.kill()
    rows = [json.loads(line) for line in held(path)]
    assert [row["n"] for row in rows] == list(range(len(rows)))
    assert len(rows) >= len(acknowledged)


# --- digests --------------------------------------------------------------------------------------------------------


def test_another_model_has_another_digest(tmp_path: Path) -> None:
    big = bytearray(17 * 2**20)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(big)
    first = folder_digest(tmp_path)
    assert folder_digest(tmp_path) == first
    big[0] = 1
    (tmp_path / "model.safetensors").write_bytes(big)
    second = folder_digest(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert len({first, second, folder_digest(tmp_path)}) == 3


def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    """Neither its torn last line nor a single line without a newline is cut off before the caller accepts the file."""
    path = tmp_path / "mine.json"
    path.write_bytes(b'{"precious": "no newline"}')
    with pytest.raises(ValueError, match=r"mine\.json must be a file that this command wrote; got other content"):
        AppendLog(path, begins=b'{"row": ')
    path.write_bytes(b'{"a": 1}\n{"precious": "no newline"}')
    with AppendLog(path, begins=b'{"row": ') as log:
        assert log.torn
        assert list(log.lines()) == [(1, b'{"a": 1}\n')]
    assert path.read_bytes() == b'{"a": 1}\n{"precious": "no newline"}'
    path.write_bytes(b'{"ro')
    with AppendLog(path, begins=b'{"row": ') as log:
        log.cut_torn_line()
    assert path.read_bytes() == b""


def test_a_number_of_thousands_of_digits_is_a_fault_of_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": ' + b"1" * 5000 + b'}\n{"a": 1}\n')
    (_, fault), (_, row) = read_jsonl(path)
    assert isinstance(fault, RowFault)
    assert row == {"a": 1}


def test_an_atomic_write_follows_links_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    write_atomically(tmp_path / "made" / "file", "x")
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "target", "newer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "made", "target"]
    assert (tmp_path / "target").read_text() == "new"


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "folder"])
def test_a_folder_replaces_anything(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    if kind == "file":
        path.write_text("x")
    elif kind == "folder":
        (path / "inner").mkdir(parents=True)
    else:
        path.symlink_to(tmp_path / ("nowhere" if kind == "dangling link" else "."))
    with folder_in_one_rename(path, replace=True) as staging:
        (staging / "new").write_text("x")
    assert [file.name for file in path.iterdir()] == ["new"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_earlier_folder_comes_back_if_the_new_one_cannot_be_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").write_text("x")
    rename = Path.rename

    def fails_for_the_new_one(self: Path, target: Path) -> Path:
        if target == path and not self.name.endswith(".old"):
            raise OSError(errno.EXDEV, "no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with pytest.raises(OSError, match="no"), folder_in_one_rename(path, replace=True):
        pass
    assert [file.name for file in path.iterdir()] == ["old"]


def test_a_byte_order_mark_is_left_out_at_the_beginning_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": 2}\n')
    first, second = (row for _, row in read_jsonl(path))
    assert first == {"a": 1}
    assert isinstance(second, RowFault)
