"""Rows are right: the prompt appears once, nothing is silently lost or added, and labels exist if a loss needs them."""

import doctest
import json

import datasets
import pytest
from test_data import CHAT, assistant, jsonl, tokenizer, user, words

from nca_kernels.integrations.data import load
from nca_kernels.integrations.data.load import load_groups
from nca_kernels.integrations.data.rows import RowOptions, prepare_rows
from nca_kernels.integrations.data.tokenize import tokenize_groups

PLAIN = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [0.5, 2, -1]}
END_CHAT = CHAT.replace("{{ END }}", "<|end|>")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def system(content):
    return {"role": "system", "content": content}


def prepared(rows, **options):
    return prepare_rows("train_dataset", rows, tokenizer(), RowOptions(**options))


# The prompt, once.

PROMPTS = {
    "system in the prompt": ([system("s"), user("q")], [user("q")], [system("s"), user("q")]),
    "system in both": ([system("s"), user("q")], [system("s"), user("q")], [system("s"), user("q")]),
    "a trailing space": ([user("q ")], [user("q")], [user("q")]),
    "a further key": ([{**user("q"), "id": 1}], [user("q")], [user("q")]),
    "the last turn alone": ([user("q2")], [user("q"), assistant("a"), user("q2")], [user("q"), assistant("a"), user("q2")]),
    "system and the last turn": (
        [system("s"), user("q2")],
        [user("q"), assistant("a"), user("q2")],
        [system("s"), user("q"), assistant("a"), user("q2")],
    ),
    "the end in the conversation": ([user("q"), assistant("a"), user("q2")], [user("q2")], [user("q"), assistant("a"), user("q2")]),
    "an overlap": ([user("q"), assistant("a")], [assistant("a"), user("q2")], [user("q"), assistant("a"), user("q2")]),
    "a text beside a system message": ("q", [system("s")], [system("s"), user("q")]),
    "a text and its conversation": ("q", [system("s"), user("q")], [system("s"), user("q")]),
    "a text of the whole conversation": ("q\n\na\n\nq2", [user("q"), assistant("a"), user("q2")], None),
    "nothing": (None, [user("q")], [user("q")]),
    "no conversation": ([system("s"), user("q")], [], [system("s"), user("q")]),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_prompt_that_comes_twice_is_there_once(tmp_path, case):
    prompt, turns, wanted = PROMPTS[case]
    row = {"prompt": prompt, "chosen": [*turns, assistant("good")], "rejected": [*turns, assistant("bad")]}
    (group,) = load_groups(jsonl(tmp_path, row)).rows
    assert [(m["role"], m["content"].strip()) for m in group["prompt"]] == [(m["role"], m["content"]) for m in wanted or turns]
    assert [response["content"] for response in group["responses"]] == ["good", "bad"]


@pytest.mark.parametrize("prompt", ["other", [user("other")], [system("s"), user("other")]])
def test_two_prompts_are_a_bad_row(tmp_path, prompt):
    row = {"prompt": prompt, "chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]}
    with pytest.raises(ValueError, match="row 1, column prompt: differs from the messages before the response"):
        load_groups(jsonl(tmp_path, row))


def test_responses_whose_turns_differ_in_white_space_and_keys_alone(tmp_path):
    row = {"chosen": [user("q "), assistant("good")], "rejected": [{**user("q"), "id": 7}, assistant("bad")]}
    assert len(load_groups(jsonl(tmp_path, row)).rows) == 1


# Nothing that the file did not have.


def call(city, **more):
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"city": city, **more}}}],
    }


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset", "list"])
def test_no_null_comes_in_from_another_row(tmp_path, kind):
    rows = [
        {"prompt": [user("q")], "responses": [call("Rome"), assistant("a")], "scores": [1.0, 0.0]},
        {
            "prompt": [{**user("q"), "name": "n"}],
            "responses": [call("Bonn", zone={"a": [1]}), assistant("b")],
            "scores": [1.0, 0.0],
        },
    ]
    if kind == "jsonl":
        source = jsonl(tmp_path, *rows)
    elif kind == "parquet":
        source = str(tmp_path / "data.parquet")
        datasets.Dataset.from_list(rows).to_parquet(source)
    else:
        source = rows if kind == "list" else datasets.Dataset.from_list(rows)
    made = load_groups(source).rows
    assert "null" not in json.dumps(list(made)) and made[0]["responses"][0] == call("Rome")
    assert made[0]["prompt"] == [user("q")] and made[1]["prompt"][0]["name"] == "n"


def test_nulls_of_the_file_stay(tmp_path):
    row = {"prompt": [user("q")], "responses": [call("Rome", zone=None), assistant("a")], "scores": [1.0, 0.0]}
    made = load_groups(jsonl(tmp_path, row)).rows
    assert made[0]["responses"][0] == call("Rome", zone=None)
    assert load_groups(made).rows[0]["responses"][0] == call("Rome", zone=None)


# The system message and the tools.

TOOLED = END_CHAT.replace("{% for m", "{% if tools %}{% for t in tools %}{{ t['name'] }}{% endfor %}{% endif %}{% for m", 1)


def test_a_system_column_makes_chats_of_all_rows(tmp_path):
    path = jsonl(tmp_path, {**PLAIN, "system": "s"}, PLAIN, {**PLAIN, "system": ""})
    rows = load_groups(path).rows
    assert list(rows["prompt"]) == [[system("s"), user("q")], [user("q")], [user("q")]]
    other = {"system": "s", "prompt": [system("t"), user("q")], "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match="column system: differs from the system message of the prompt"):
        load_groups(jsonl(tmp_path, other))


@pytest.mark.parametrize("tools", [[{"name": "xyz"}], '[{"name": "xyz"}]', ['{"name": "xyz"}']])
def test_tools_reach_the_template_or_are_refused(tmp_path, tools):
    groups = load_groups(jsonl(tmp_path, {**PLAIN, "tools": tools}))
    made = tokenize_groups(groups, tokenizer(TOOLED)).rows
    assert "xyz" in "".join(words(made[0]["prompt_ids"]))
    with pytest.raises(ValueError, match="data.jsonl: row 1, column tools: the chat template writes no tools"):
        tokenize_groups(groups, tokenizer(END_CHAT))


def test_a_template_without_system_messages_names_them(tmp_path):
    groups = load_groups(jsonl(tmp_path, {**PLAIN, "system": "sys"}))
    silent = END_CHAT.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    with pytest.raises(ValueError, match="row 1, column system: the chat template leaves out some of its content, 'sys'"):
        tokenize_groups(groups, tokenizer(silent))


# One bad response.

LOSSES = {
    "empty": {"responses": ["a", " ", "c"], "scores": [1, 2, 3]},
    "null": {"responses": ["a", None, "c"], "scores": [1, 2, 3]},
    "without a score": {"responses": ["a", "b", "c"], "scores": [1, None, 3]},
    "an empty message": {"responses": [assistant("a"), assistant(""), assistant("c")], "scores": [1, 2, 3]},
}


@pytest.mark.parametrize("case", LOSSES)
def test_a_response_that_is_missing_costs_itself(tmp_path, case, caplog):
    groups = load_groups(jsonl(tmp_path, PLAIN | {"prompt": [user("q")]}, {"prompt": [user("q")], **LOSSES[case]}))
    assert list(groups.rows["scores"]) == [[0.5, 2, -1], [1, 3]]
    assert [each["content"] for each in groups.rows[1]["responses"]] == ["a", "c"]
    assert list(groups.dropped) == [2] and "1 responses in 1 rows left out, the first: row 2, column" in caplog.text


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "high", True])
def test_a_response_with_a_bad_score_costs_itself_where_rows_are_skipped(tmp_path, bad):
    path = jsonl(tmp_path, {**PLAIN, "scores": [1, bad, 3]})
    with pytest.raises(ValueError, match=r"row 1, column scores\[1\]: got"):
        load_groups(path)
    assert load_groups(path, skip_bad_rows=True).rows[0]["scores"] == [1, 3]


def test_numbers_that_no_float_holds_are_bad_rows():
    for row in (
        {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 10**400},
        {"prompt": "q", "responses": ["a"], "scores": [10**400]},
        {"prompt": "q", "responses": ["a", "b"], "scores": [[], {}]},
    ):
        with pytest.raises(ValueError, match=r"row 1, column .*: got .*, wanted a finite number"):
            load_groups([row])


# KTO.


def test_labels_are_read_as_labels():
    rows = prepared(
        [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "p", "completion": "b", "label": False}], loss="kto"
    )
    assert rows["desirable"] == [[True], [False]]


def test_a_preference_labels_its_two():
    rows = prepared([{"prompt": "q", "chosen": "a", "rejected": "b"}] * 2, loss="kto")
    assert rows["desirable"] == [[True, False]] * 2


@pytest.mark.parametrize(
    ("scores", "threshold", "desirable"),
    [
        ([[0.0], [1.0]], 0.5, [[False], [True]]),
        ([[3, 9], [1, 7]], 7, [[False, True], [False, True]]),
        ([[-1.0, -2.0], [2.0, 1.0]], None, [[False, False], [True, True]]),
    ],
)
def test_a_threshold_or_the_sign_decides(scores, threshold, desirable):
    rows = [{"prompt": f"q{i}", "responses": ["a", "b"][: len(row)], "scores": row} for i, row in enumerate(scores)]
    assert prepared(rows, loss="kto", kto_threshold=threshold)["desirable"] == desirable


@pytest.mark.parametrize("scores", [[[0.0], [0.0]], [[1.0, 0.0], [1.0, 1.0]], [[9, 1], [3, 4]], [[-1, -2], [-3, -1]]])
def test_scores_that_decide_nothing_are_refused(scores):
    rows = [{"prompt": f"q{i}", "responses": ["a", "b"][: len(row)], "scores": row} for i, row in enumerate(scores)]
    with pytest.raises(ValueError, match="train_dataset: column scores: from .* wanted kto_threshold"):
        prepared(rows, loss="kto")
    with pytest.raises(ValueError, match="train_dataset: row 2, column scores: 0 is neither good nor bad"):
        prepared([{**PLAIN, "scores": [1, 2, -3]}, {**PLAIN, "scores": [1, 0, -3]}], loss="kto")


# Rows that cannot teach.


@pytest.mark.parametrize("rows", [[{**PLAIN, "scores": [1, 1, 1]}], [{"prompt": "q", "responses": ["a"], "scores": [1]}]])
def test_rows_that_teach_nothing_are_counted_and_all_of_them_refused(rows, caplog):
    with pytest.raises(ValueError, match="train_dataset: no row has two responses with different scores"):
        prepared(rows)
    assert len(prepared([*rows, PLAIN])) == 2
    assert "1 of 2 rows have no two different scores, and teach nothing" in caplog.text
    assert len(prepare_rows("eval_dataset", rows, tokenizer(), RowOptions(), training=False)) == 1
    assert len(prepared(rows, nll_weight=1.0)) == 1


def test_responses_that_truncation_makes_equal_are_counted(caplog):
    rows = datasets.Dataset.from_list([{"prompt": "a", "responses": ["0123456789", "0123456788"], "scores": [1.0, 0.0]}])
    made = tokenize_groups(rows, tokenizer(), max_length=8)
    assert made.responses_equal == 1 and "1 responses have the same tokens as another response" in caplog.text


# The end of a response.


@pytest.mark.parametrize("end", ["</s>", "<|end|>", ""])
@pytest.mark.parametrize("how", ["column", "message", "object", "text"])
def test_a_response_that_is_not_finished_gets_no_end(tmp_path, how, end):
    chat = how != "text"
    row = {"prompt": [user("q")] if chat else "q", "responses": ["ab", "cd"], "scores": [1, 0]}
    if how in ("column", "text"):
        row["finished"] = [True, False]
    elif how == "message":
        row["responses"] = [assistant("ab"), {**assistant("cd"), "finished": False}]
    else:
        row["responses"] = [{"text": "ab", "finished": True}, {"text": "cd", "finished": False}]
    groups = load_groups(jsonl(tmp_path, row))
    assert groups.rows[0]["finished"] == [True, False] and "finished" not in json.dumps(groups.rows[0]["responses"])
    made = tokenize_groups(groups, tokenizer(CHAT.replace("{{ END }}", end) if chat else None), max_length=8).rows[0]
    assert [words(ids) for ids in made["response_ids"]] == [["a", "b", (end if chat else "") or "</s>"], ["c", "d"]]


def test_an_unfinished_response_is_cut_at_its_end():
    rows = datasets.Dataset.from_list(
        [{"prompt": "ab", "responses": ["0123456789"] * 2, "scores": [1.0, 0.0], "finished": [True, False]}]
    )
    first, second = tokenize_groups(rows, tokenizer(), max_length=8).rows[0]["response_ids"]
    assert words(first) == [*"0123", "</s>"] and words(second) == [*"01234"]


# What a template or a tokenizer cannot write.

R1 = END_CHAT.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")


def thought(text, answer="yes"):
    return assistant(f"<think>{text}</think>{answer}")


BAD_TOKENS = {
    "thinking is stripped": (
        R1,
        [thought("abc"), thought("xyz")],
        r"column responses\[0\]: the chat template leaves out some of its content",
    ),
    "thinking in a key of its own": (
        END_CHAT,
        [{**assistant("a"), "reasoning_content": "because"}, assistant("b")],
        r"column responses\[0\]: the chat template leaves out some of its reasoning_content, 'because'",
    ),
    "tool calls are dropped": (
        END_CHAT,
        [assistant("a"), {**assistant("b"), "tool_calls": [{"function": {"name": "fun", "arguments": {}}}]}],
        r"column responses\[1\]: the chat template leaves out 'fun' of its tool calls",
    ),
    "the words are others": (
        END_CHAT.replace("m['content'] }}", "m['content'] | lower }}"),
        [assistant("A"), assistant("a")],
        r"column responses\[0\]: the chat template leaves out",
    ),
    "the same tokens": (
        END_CHAT,
        [assistant("ä"), assistant("ö")],
        r"column responses\[1\]: differs from responses\[0\], and has the same tokens",
    ),
    "the template raises": ("{{ raise_exception('no system') }}", [assistant("a"), assistant("b")], "column prompt: .*: no system"),
    "the template fails": ("{{ 1 / 0 }}", [assistant("a"), assistant("b")], "column prompt: the chat template refuses"),
    "the template misses a key": (
        "{{ messages[0].gone.key }}",
        [assistant("a"), assistant("b")],
        "column prompt: the chat template refuses",
    ),
}


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_what_a_template_does_not_write_is_a_bad_row(tmp_path, case):
    template, responses, problem = BAD_TOKENS[case]
    good = {"prompt": [user("q")], "responses": [assistant("c"), assistant("d")], "scores": [1, 0]}
    path = jsonl(tmp_path, good, "", {**good, "responses": responses})
    groups = load_groups(path)
    with pytest.raises(ValueError, match=rf"{path}: row (1|3), {problem}"):
        tokenize_groups(groups, tokenizer(template))
    if "row 1" not in problem and case in ("thinking is stripped", "the same tokens", "tool calls are dropped"):
        made = tokenize_groups(groups, tokenizer(template), skip_bad_rows=True)
        assert len(made.rows) == 1 and list(made.skipped) == [1]


def test_a_prompt_that_merges_whole_into_its_response_is_a_bad_row(tmp_path):
    plain = tokenizer()
    plain.backend_tokenizer.post_processor = None
    groups = load_groups(jsonl(tmp_path, {"prompt": "t", "responses": ["he end", " no"], "scores": [1, 0]}, PLAIN))
    with pytest.raises(ValueError, match="data.jsonl: row 1, column prompt: its tokens 't' are not the first tokens"):
        tokenize_groups(groups, plain)
    assert len(tokenize_groups(groups, plain, skip_bad_rows=True).rows) == 1


def test_variables_of_the_template(tmp_path):
    template = END_CHAT.replace("<|a|>{% endif %}", "<|a|>{% if enable_thinking %}th{% endif %}{% endif %}")
    row = {"prompt": [user("q")], "responses": ["c", "d"], "scores": [1, 0]}
    groups = load_groups(jsonl(tmp_path, row, {**row, "chat_template_kwargs": {"enable_thinking": True}}))
    assert tokenize_groups(groups, tokenizer(template)).prompts_merged == 1
    assert tokenize_groups(groups, tokenizer(template), chat_template_kwargs={"enable_thinking": True}).prompts_merged == 2


def test_the_date_in_a_template_is_that_of_the_day(tmp_path, monkeypatch):
    from transformers.utils import chat_template_utils

    groups = load_groups(jsonl(tmp_path, {"prompt": [user("q")], "responses": ["c", "d"], "scores": [1, 0]}))
    dated = tokenizer("{{ strftime_now('%Y') }}" + END_CHAT)

    class Clock(chat_template_utils.datetime):
        year_now = 2031

        @classmethod
        def now(cls, tz=None):
            return chat_template_utils.datetime.__mro__[1](cls.year_now, 1, 1)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    for year in (2031, 2032):
        Clock.year_now = year
        assert str(year) in "".join(words(tokenize_groups(groups, dated).rows[0]["prompt_ids"]))


def test_the_docstring_example():
    results = doctest.testmod(load)
    assert results.failed == 0 and results.attempted == 1
