"""A build on several hosts: the shares merge into exactly the build of one host."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builder_kit import Reply, ScriptedServer, chat_reply, prompts, read_rows, stage_of

from axolotl_mote.builder.loop.journal import JournalError
from axolotl_mote.builder.run import build
from axolotl_mote.builder.settings import Budget, Settings
from axolotl_mote.builder.shards import Shard
from axolotl_mote.chain.questions import Question
from axolotl_mote.files import FileInUseError

Make = Callable[..., Settings]
Serve = Callable[..., ScriptedServer]
DATA = ("chains.jsonl", "rejected.jsonl")


def answer(body: dict[str, Any], number: int) -> Reply:
    """Depends on the request alone; some answers are the same for many questions, and some are found unsafe."""
    text = body["messages"][-1]["content"]
    seed = int(body["seed"])
    if stage_of(body) == "check":
        return chat_reply("VERDICT: SAFE" if seed % 2 else "VERDICT: UNSAFE")
    if stage_of(body) == "response" and seed % 3 == 0:
        return chat_reply("One and the same answer to each of these many questions here.")
    return chat_reply(f"{seed} says {text[:30]} and {seed * 31}")


def data(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in DATA]


def questions(count: int) -> list[Question]:
    return [Question([{"role": "user", "content": row["prompt"]}]) for row in prompts(count)]


@pytest.mark.parametrize("of", [1, 3, 7])
def test_every_question_has_one_owner(of: int) -> None:
    shards = [Shard(number, of) for number in range(1, of + 1)]
    asked = questions(200)
    assert all(sum(shard.owns(question) for shard in shards) == 1 for question in asked)
    assert all(any(shard.owns(question) for question in asked) for shard in shards)


@pytest.mark.parametrize(
    "text", ["", "2", "0/3", "4/3", "-1/3", "1/0", "a/b", "1/3/5", " 1/3", "1.5/3", "²/3", "1/9999999"]
)
def test_other_forms_of_a_shard_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^shard must be I/N with I from 1 to N; got "):
        Shard.parse(text)


@pytest.mark.parametrize("of", [2, 5])
def test_merged_shards_are_the_build_of_one_host(make_settings: Make, serve: Serve, tmp_path: Path, of: int) -> None:
    server = serve(answer)
    rows = {"count": 30, "deduplicate": 0.8}
    whole = build(make_settings(server.url, output=tmp_path / "whole", **rows))
    asked = len(server.bodies)
    settings = make_settings(server.url, **rows)
    for number in reversed(range(1, of + 1)):
        build(settings, shard=Shard(number, of))
    assert len(server.bodies) == 2 * asked  # nothing is asked twice
    merged = build(settings, merge=True)
    assert len(server.bodies) == 2 * asked
    assert data(settings.output) == data(tmp_path / "whole")
    assert merged.counts == whole.counts
    assert merged.counts["reasons"]["near_duplicate_answer"] > 1  # across shards too
    kept = [len(read_rows(Shard(number, of).folder(settings.output) / "chains.jsonl")) for number in range(1, of + 1)]
    assert min(kept) > 0
    assert sum(kept) > merged.counts["kept"]
    again = build(settings, merge=True)
    assert (again.counts, data(settings.output)) == (merged.counts, data(tmp_path / "whole"))
    assert build(settings).requests == 0  # and it is an ordinary build


def test_shards_that_are_not_done_are_merged_as_far_as_they_are(make_settings: Make, serve: Serve) -> None:
    server = serve(answer)
    settings = make_settings(server.url, count=12)
    build(settings, shard=Shard(1, 2))
    early = build(settings.model_copy(update={"budget": Budget(requests=4)}), shard=Shard(2, 2))
    first = build(settings, merge=True)
    assert first.counts["pending"] == early.counts["pending"] > 0
    build(settings, shard=Shard(2, 2))
    assert build(settings, merge=True).counts["pending"] == 0


def test_what_cannot_be_merged_is_refused(make_settings: Make, serve: Serve) -> None:
    server = serve(answer)
    settings = make_settings(server.url, count=8)
    with pytest.raises(ValueError, match=r"^output must hold the shards of one split; got none at "):
        build(settings, merge=True)
    build(settings, shard=Shard(1, 3))
    build(settings, shard=Shard(3, 3))
    with pytest.raises(ValueError, match=r"^output must hold all shards; shard-2-of-3 missing at .* Run them first\.$"):
        build(settings, merge=True)
    assert not (settings.output / "journal.jsonl").exists()
    build(settings, shard=Shard(2, 3))
    other = settings.model_copy(update={"seed": 7})
    with pytest.raises(JournalError, match="seed: 42 -> 7"):
        build(other, merge=True)
    assert not (settings.output / "journal.jsonl").exists()
    build(settings, shard=Shard(1, 2))
    with pytest.raises(ValueError, match=r"one split; got shard-\*-of-2 and shard-\*-of-3 at "):
        build(settings, merge=True)


def test_a_shard_that_still_runs_is_not_merged(make_settings: Make, serve: Serve) -> None:
    from axolotl_mote.builder.loop.journal import Journal
    from axolotl_mote.builder.settings import identity
    from axolotl_mote.builder.texts.prompts import Prompts

    settings = make_settings(serve(answer).url)
    for number in (1, 2):
        build(settings, shard=Shard(number, 2))
    what = identity(
        settings, Prompts(settings.active_specs(), settings.prompts, settings.hygiene.control_tokens).hashes
    )
    with Journal(Shard(2, 2).folder(settings.output) / "journal.jsonl", what), pytest.raises(FileInUseError):
        build(settings, merge=True)


def test_a_torn_journal_of_a_shard_is_merged_without_its_last_line(make_settings: Make, serve: Serve) -> None:
    settings = make_settings(serve(answer).url, count=8)
    for number in (1, 2):
        build(settings, shard=Shard(number, 2))
    journal = Shard(1, 2).folder(settings.output) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])
    merged = build(settings, merge=True)
    assert merged.counts["pending"] == 1
    calls = [json.loads(line) for line in (settings.output / "journal.jsonl").read_text().splitlines()[1:]]
    assert len({call["call"] for call in calls}) == len(calls)


def test_a_shard_that_was_begun_anew_does_not_lose_to_its_older_texts(make_settings: Make, serve: Serve) -> None:
    said = iter(range(10**6))

    def never_twice_the_same(body: dict[str, Any], number: int) -> Reply:
        return chat_reply("VERDICT: SAFE" if stage_of(body) == "check" else f"answer number {next(said)} of many")

    settings = make_settings(serve(never_twice_the_same).url, count=8)
    for number in (1, 2):
        build(settings, shard=Shard(number, 2))
    build(settings, merge=True)
    first = data(settings.output)
    build(settings, shard=Shard(2, 2), restart=True)
    with pytest.raises(JournalError, match=r"two results of .* That shard was begun anew: add --restart\.$"):
        build(settings, merge=True)
    assert data(settings.output) == first
    build(settings, merge=True, restart=True)
    shards = [Shard(number, 2).folder(settings.output) for number in (1, 2)]
    of_shards = {row["response"] for folder in shards for row in read_rows(folder / "chains.jsonl")}
    assert {row["response"] for row in read_rows(settings.output / "chains.jsonl")} == of_shards
