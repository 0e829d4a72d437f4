"""Control tokens in foreign text are broken up, whatever family they belong to."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from axolotl_mote.chain.quoting import CONTROL_TOKEN, neutralize, strip_control_tokens
from axolotl_mote.chain.steps import DEFAULT_STEPS, markers

# One line per family of chat templates.
FAMILIES = [
    token
    for line in """
<|im_start|> <|im_end|> <|endoftext|> <|im_middle|> <|im_sep|>
<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|header_start|> <|eot|> <|python_tag|>
<｜begin▁of▁sentence｜> <｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜> <｜hy_place▁holder▁no▁3｜>
<|system|> <|user|> <|assistant|> <|end|> <|channel|> <|message|> <|return|> <|start|> <|observation|>
<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|CHATBOT_TOKEN|> <BOS_TOKEN> <EOS_TOKEN> <EOP_TOKEN> <MASK_TOKEN>
<|start_of_role|> <|end_of_role|> <|separator|> <|role_start|> <|turn_end|>
<start_of_turn> <end_of_turn> <bos> <eos> <pad> <unk> <mask> <start_of_image> <start_function_call> <unused1> <unused94>
<|turn> <turn|> <|channel> <channel|> <|tool_call> <tool_call|> <|think|> <|"|>
<s> </s> [INST] [/INST] <<SYS>> <</SYS>> [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS]
[THINK] [/THINK] [TOOL_CONTENT] [CALL_ID] [MODEL_SETTINGS] [/MODEL_SETTINGS] [IMG_BREAK] [IMG_END] [BEGIN_AUDIO]
[|system|] [|user|] [|assistant|] [|endofturn|] [|tool|] [BOS] [EOS] [PAD] [UNK]
<seed:bos> <seed:eos> <seed:think> </seed:think> <seed:tool_call> <minimax:tool_call>
]~!b[ ]~b]user ]~b]ai ]~b]system [e~[ ]<]speech[>[ ]<]start[>[ <beginning_of_sentence> <end_of_sentence>
[gMASK]<sop> [sMASK] [MASK] <eop> <eod> <eoh> <eoa>
[EOT] [start_header_id] [end_header_id] [CLS] [SEP] <cls> <sep>
<reserved_106> <extra_id_0> <SPECIAL_10> <TOKENS_UNUSED_1> [unused9] [UNUSED_TOKEN_145] <_user> <_bot> <_end>
<role>HUMAN <role>SYSTEM <end_of_utterance>
""".splitlines()
    for token in line.split()
]


@pytest.mark.parametrize("token", [*FAMILIES, *markers([*DEFAULT_STEPS, "check"])])
def test_control_tokens_of_the_models_of_the_day_are_broken_up(token: str) -> None:
    text, broken = neutralize(f"a {token} b{token}{token}c")
    assert token not in text
    assert broken >= 3
    assert CONTROL_TOKEN.search(text) is None
    assert text.replace(" ", "") == f"a{token}b{token}{token}c".replace(" ", "")


ORDINARY = """\
if a < b: print([1, 2]) | x <b>bold</b> <stdio.h> a|b; a || b; x |> f; f <| x; let a = [|1; 2|]; List<Turn>; 1 <2|3> 4
usage: prog [ARGS] [--think] [img]x[/img] [think] [ref] [INSTALL] [MASKS] <image> <think> <tool_call> <role>Cook</role>
a[i]~b, ~b]x, <0x0A>, <unused>, <start_date>, <end>, <seed>, <sepal>, a[0]<a[1], <html|body, <a href="x">|</a>"""


def test_ordinary_text_stays_as_it_is() -> None:
    for line in ORDINARY.splitlines():
        assert neutralize(line) == (line, 0)
        assert strip_control_tokens(line) == line


def test_more_control_tokens_can_be_named() -> None:
    assert neutralize("a %%me%% b", ["%%me%%"]) == ("a % %me%% b", 1)
    assert neutralize("a.*b", [".*"]) == ("a. *b", 1)
    assert strip_control_tokens(" %%me%% <|x|> a %%me%% b %%me%%\n", ["%%me%%"]) == "a %%me%% b"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<|a|> \n</s>x</s> <|b|>\n", "x"),
        ("<|a|>", ""),
        ("<|a|></s> ", ""),
        ("", ""),
        (" \n", ""),
        ("x <|a|> y", "x <|a|> y"),
        ("<|a|>x", "x"),
        ("x<|a|>", "x"),
    ],
)
def test_control_tokens_at_the_ends_are_removed(text: str, left: str) -> None:
    assert strip_control_tokens(text) == left


FRAGMENTS = [
    *FAMILIES,
    *"<>|｜[]/~bes!a:_1 \n",
    *("<|", "|>", "[|", "|]", "]~b", "<<SYS", "INST]", "role>", "HUMAN"),
]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join))
@example("<|a]~b]user|>")
@example("<|im_<|x|>end|>")
@example("[[INST]INST]")
@example("<<<SYS>>>")
def test_nothing_is_left_to_break_up(text: str) -> None:
    harmless, broken = neutralize(text)
    assert CONTROL_TOKEN.search(harmless) is None
    assert neutralize(harmless) == (harmless, 0)
    assert (broken == 0) == (harmless == text)
    stripped = strip_control_tokens(text)
    assert stripped in text
    assert stripped == strip_control_tokens(stripped) == stripped.strip()
