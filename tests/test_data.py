"""Reward data in all layouts, the errors for bad rows, and the tokens."""

import json

import datasets
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nca_kernels.integrations.data.load import load_groups
from nca_kernels.integrations.data.tokenize import tokenize_groups, truncate


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Use an empty cache, so that no earlier run matters and nothing is left in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def jsonl(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


PLAIN = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [0.5, 2, -1]}


def test_ragged_rows_of_responses_and_scores(tmp_path):
    groups = load_groups(jsonl(tmp_path, PLAIN, {"prompt": "p", "responses": ["d"], "scores": [3]}))
    assert list(groups.rows) == [PLAIN, {"prompt": "p", "responses": ["d"], "scores": [3.0]}]
    assert not groups.preference and groups.skipped == {}


def test_chosen_and_rejected(tmp_path):
    groups = load_groups(jsonl(tmp_path, {"prompt": "q", "chosen": "good", "rejected": "bad"}))
    assert list(groups.rows) == [{"prompt": "q", "responses": ["good", "bad"], "scores": [1.0, 0.0]}]
    assert groups.preference


def test_chosen_and_rejected_as_whole_conversations(tmp_path):
    turns = [{"role": "system", "content": ""}, user("q")]
    row = {"prompt": "q", "chosen": [*turns, assistant("good")], "rejected": [*turns, assistant("bad")]}
    (group,) = load_groups(jsonl(tmp_path, row)).rows
    assert group["prompt"] == turns and group["responses"] == [assistant("good"), assistant("bad")]


def test_messages_without_the_prompt_follow_it(tmp_path):
    row = {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    (group,) = load_groups(jsonl(tmp_path, row)).rows
    assert group["prompt"] == [user("q")] and group["responses"] == [assistant("good"), assistant("bad")]


def test_texts_answer_a_prompt_of_messages(tmp_path):
    (group,) = load_groups(jsonl(tmp_path, {**PLAIN, "prompt": [user("q")]})).rows
    assert group["responses"] == [assistant("a"), assistant("b"), assistant("c")]


def reward_layout(k):
    conversations = {f"A{i}": [user("q"), assistant(f"answer {i}")] for i in range(k)}
    return {"prompt": "q", **conversations, **{f"score_A{i}": float(i) for i in range(k)}}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "dataset"])
def test_the_reward_layout_from_every_source(tmp_path, suffix):
    # Twelve, since A10 sorts before A2 as text; the second row has three, with nulls for the rest.
    table = datasets.Dataset.from_list([reward_layout(12), reward_layout(3)])
    path = str(tmp_path / f"data.{suffix}")
    if suffix == "jsonl":
        table.to_json(path)
    elif suffix == "parquet":
        table.to_parquet(path)
    rows = load_groups(table if suffix == "dataset" else path).rows
    assert [len(row["responses"]) for row in rows] == [12, 3]
    assert rows[0]["scores"] == list(range(12)) and rows[0]["responses"][10] == assistant("answer 10")
    assert rows[0]["prompt"] == [user("q")]


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_a_dataset_formatted_for_tensors(form):
    made = load_groups(datasets.Dataset.from_list([PLAIN]).with_format(form)).rows
    assert list(made) == [PLAIN]


def test_keys_that_only_some_messages_have_do_not_spread_to_the_others(tmp_path):
    named = {**user("q"), "name": "someone"}
    path = str(tmp_path / "data.parquet")
    rows = [{**PLAIN, "prompt": [user("q")]}, {**PLAIN, "prompt": [named]}]
    datasets.Dataset.from_list(rows).to_parquet(path)
    assert [row["prompt"] for row in load_groups(path).rows] == [[user("q")], [named]]


def test_a_folder_as_hub_names_are(tmp_path):
    datasets.Dataset.from_list([PLAIN]).to_parquet(str(tmp_path / "folder" / "test.parquet"))
    assert load_groups(str(tmp_path / "folder"), split="test").rows[0]["responses"] == ["a", "b", "c"]


@pytest.mark.parametrize("rows", [[PLAIN], [reward_layout(2), reward_layout(3)]], ids=["text", "chat"])
def test_its_own_rows_load_again(tmp_path, rows):
    made = load_groups(jsonl(tmp_path, *rows)).rows
    assert list(load_groups(made).rows) == list(made)


@pytest.mark.parametrize("text", ["4", "null", '"q"', '{"a": 1}', "[1]"])
def test_texts_that_are_json_stay_texts(tmp_path, text):
    rows = load_groups(jsonl(tmp_path, {"prompt": text, "chosen": text, "rejected": "x"})).rows
    assert rows.map(lambda row: row)[0] == {"prompt": text, "responses": [text, "x"], "scores": [1.0, 0.0]}
    chat = load_groups(jsonl(tmp_path, {"prompt": [user(text)], "chosen": text, "rejected": "x"})).rows
    assert chat.map(lambda row: row)[0]["responses"] == [assistant(text), assistant("x")]


def test_line_separators_inside_a_text_do_not_end_its_row(tmp_path):
    text = "a\u2028b\u0085c\x0bd"
    row = {"prompt": text, "chosen": "x", "rejected": "y"}
    assert load_groups(jsonl(tmp_path, json.dumps(row, ensure_ascii=False))).rows[0]["prompt"] == text


BAD = {
    "no responses": ({"prompt": "q", "responses": [], "scores": []}, "column responses: no responses"),
    "no answers": ({"prompt": "q", "A0": None, "score_A0": None, "chosen": None}, "column A0: no responses"),
    "unequal": ({**PLAIN, "scores": [1.0]}, "column scores: got 1 scores for 3 responses"),
    "no scores": ({"prompt": "q", "responses": ["a"]}, "column scores: got NoneType, wanted a list"),
    "nan": ({**PLAIN, "scores": [1.0, float("nan"), 2.0]}, r"column scores\[1\]: got nan, wanted a finite number"),
    "inf": ({**PLAIN, "scores": [1.0, 2.0, float("inf")]}, r"column scores\[2\]: got inf"),
    "inf in float32": ({**PLAIN, "scores": [1.0, 2.0, 1e39]}, r"column scores\[2\]: got 1e\+39"),
    "text as score": ({**PLAIN, "scores": [1.0, "2", 3.0]}, r"column scores\[1\]: got '2'"),
    "no score": ({**PLAIN, "scores": [None, None, None]}, r"column scores\[0\]: got None, wanted a finite number"),
    "empty responses": ({**PLAIN, "responses": ["", " \n", None]}, r"column responses\[0\]: empty text"),
    "empty rejected": ({"prompt": "q", "chosen": "a", "rejected": " "}, "column rejected: empty text"),
    "empty prompt": ({**PLAIN, "prompt": ""}, "column prompt: empty text"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "column prompt: missing"),
    "no rejected": ({"prompt": "q", "chosen": "a"}, "column rejected: missing"),
    "not the assistant": (
        {**reward_layout(1), "A0": [user("q"), user("a")]},
        "column A0: the last message is of role 'user'",
    ),
    "two prompts": (
        {**reward_layout(2), "A1": [user("r"), assistant("a")]},
        "column A1: the messages before the response",
    ),
    "no messages": ({**reward_layout(2), "A1": 7}, "column A1: got int, wanted text or messages"),
    "an image": ({**PLAIN, "images": ["q.png"]}, "column images: an image, wanted text alone"),
    "unknown layout": ({"question": "q", "answer": "a"}, "column question, answer: unknown layout; wanted prompt"),
    "broken line": ('{"prompt": "q', "not JSON"),
    "not an object": ("[1, 2]", "got list, wanted a JSON object"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named_by_file_row_and_column(tmp_path, case):
    row, problem = BAD[case]
    # The empty line is no row to complain of, but it counts: rows are the file's lines.
    path = jsonl(tmp_path, PLAIN, "", row)
    with pytest.raises(ValueError, match=rf"^{path}: row 3, .*({problem})"):
        load_groups(path)


def test_bad_rows_are_skipped_counted_and_reported(tmp_path, caplog):
    path = jsonl(tmp_path, BAD["unequal"][0], PLAIN, {**PLAIN, "responses": 7}, PLAIN)
    with pytest.raises(ValueError, match="1 more bad row"):
        load_groups(path)
    groups = load_groups(path, skip_bad_rows=True)
    assert len(groups.rows) == 2
    assert groups.skipped == {
        1: "column scores: got 1 scores for 3 responses",
        3: "column responses: got int, wanted a list",
    }
    assert "2 of 4 rows skipped" in caplog.text and "row 3" in caplog.text


def test_texts_and_chats_in_one_source(tmp_path):
    path = jsonl(tmp_path, BAD["unequal"][0], PLAIN, {**PLAIN, "prompt": [user("q")]})
    groups = load_groups(path, skip_bad_rows=True)
    assert list(groups.rows) == [PLAIN]
    assert groups.skipped[3] == "column prompt: chat, where the first row is text; wanted one kind"


def test_a_source_without_a_usable_row_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no usable row; wanted prompt"):
        load_groups(jsonl(tmp_path, BAD["unequal"][0]), skip_bad_rows=True)


def test_sources_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.jsonl: no such file"):
        load_groups(str(tmp_path / "gone.jsonl"))
    with pytest.raises(TypeError, match="source: got DatasetDict, wanted"):
        load_groups(datasets.DatasetDict())


# Tokens. One id a character, so that lengths can be read off the texts; but "th" is one token, as BPE would merge it.

CHARS = ["<unk>", "<s>", "</s>", "<|u|>", "<|a|>", "<|end|>", "th", *"\n abcdefghijklmnopqrstuvwxyz0123456789"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|u|>' if m['role'] == 'user' else '<|a|>' }}{{ m['content'] }}{{ END }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)


def tokenizer(chat_template=None, ending=""):
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(CHARS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(pattern=Regex(r"th|[\s\S]"), behavior="isolated")
    special = [(token, CHARS.index(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=f"<s> $A {ending}".strip(), special_tokens=special)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|u|>", "<|a|>", "<|end|>"],
    )
    made.chat_template = chat_template
    return made


def words(ids):
    return [CHARS[i] for i in ids]


def tokenized(rows, chat_template=None, ending="", **limits):
    rows = datasets.Dataset.from_list([{**row, "scores": [0.0] * len(row["responses"])} for row in rows])
    return tokenize_groups(rows, tokenizer(chat_template, ending), **limits)


@pytest.mark.parametrize("ending", ["", "</s>"], ids=["tokenizer adds bos", "tokenizer adds bos and eos"])
def test_plain_text_ends_with_eos(ending):
    made = tokenized([{"prompt": "ab", "responses": ["cd", "e"]}], ending=ending)
    assert words(made.rows[0]["prompt_ids"]) == ["<s>", "a", "b"]
    assert [words(ids) for ids in made.rows[0]["response_ids"]] == [["c", "d", "</s>"], ["e", "</s>"]]
    assert made[1:] == (0, 0, 0, 0, 0, {}) and made.rows[0]["scores"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("end", "response"),
    [("</s>", ["c", "</s>"]), ("<|end|>", ["c", "<|end|>"]), ("", ["c", "</s>"])],
    ids=["eos", "a token of its own", "nothing"],
)
def test_a_chat_template_ends_the_turn_or_eos_does(end, response):
    rows = [{"prompt": [user("a"), assistant("b"), user("q")], "responses": [assistant("c"), assistant("c")]}]
    made = tokenized(rows, CHAT.replace("{{ END }}", end))
    whole = words(made.rows[0]["prompt_ids"])
    assert whole[0] == "<s>" and whole.count("<s>") == 1 and whole[-1] == "<|a|>" and "b" in whole
    assert words(made.rows[0]["response_ids"][0]) == response
    assert made.prompts_merged == 0


@pytest.mark.parametrize("how", ["| trim", "| replace('\n', '')", "+ '\n'"])
@pytest.mark.parametrize("end", ["<|end|>", ""])
def test_a_response_ends_however_the_template_writes_it(how, end):
    template = CHAT.replace("{{ m['content'] }}", f"{{{{ m['content'] {how} }}}}").replace("{{ END }}", end)
    made = tokenized([{"prompt": [user("q")], "responses": [assistant("\n\nC"), assistant("c")]}], template)
    assert [words(ids)[-1] for ids in made.rows[0]["response_ids"]] == [end or "</s>"] * 2


def test_what_the_template_writes_otherwise_after_a_response_counts_as_the_response(caplog):
    # As templates of reasoning models do: the generation prompt opens a thought that the finished turn has not.
    template = CHAT.replace("{{ END }}", "</s>").replace("<|a|>{% endif %}", "<|a|>th{% endif %}")
    made = tokenized([{"prompt": [user("q")], "responses": [assistant("c")]}], template)
    assert words(made.rows[0]["prompt_ids"])[-1] == "<|a|>" and words(made.rows[0]["response_ids"][0]) == ["c", "</s>"]
    assert made.prompts_merged == 1 and "1 of 1 prompts end in tokens that change" in caplog.text


def test_a_token_across_the_border_goes_to_the_response():
    made = tokenized([{"prompt": "at", "responses": ["he", "o"]}])
    assert words(made.rows[0]["prompt_ids"]) == ["<s>", "a"]
    assert [words(ids) for ids in made.rows[0]["response_ids"]] == [["th", "e", "</s>"], ["t", "o", "</s>"]]
    assert made.prompts_merged == 1


def test_truncation_cuts_the_prompt_first_then_responses_before_their_end(caplog):
    rows = [{"prompt": "abcdefgh", "responses": ["0123456789", "01"]}, {"prompt": "a", "responses": ["0"]}]
    made = tokenized(rows, max_length=10, max_prompt_length=4)
    first = made.rows[0]
    assert "".join(words(first["prompt_ids"])) == "<s>fgh"
    assert ["".join(words(ids)) for ids in first["response_ids"]] == ["01234</s>", "01</s>"]
    assert (made.prompts_cut, made.responses_cut, made.tokens_cut) == (1, 1, 5 + 5)
    assert "cut 1 of 2 prompts and 1 responses, 10 tokens in all" in caplog.text


def test_truncation_cuts_no_more_than_it_must():
    # The responses need 3 of 10, so the prompt keeps 7, more than max_prompt_length; a short prompt leaves its room.
    assert truncate(list(range(9)), [[20, 21, 22], [23]], 10, 4, bos_token_id=None)[0] == list(range(2, 9))
    assert truncate([1], [list(range(9))], 10, 4, bos_token_id=None)[1] == [list(range(9))]


@pytest.mark.parametrize("P", [1, 2, 3, 9])
@pytest.mark.parametrize("R", [1, 2, 3, 9])
@pytest.mark.parametrize("limits", [(4, 2), (5, 2), (5, 3), (8, 4)])
def test_truncation_keeps_bos_the_end_and_something_to_score(P, R, limits):
    prompt, (cut, short) = truncate([7, *range(1, P)], [[*range(10, 9 + R), 99], [99]], *limits, bos_token_id=7)
    assert prompt[0] == 7 and (P == 1 or prompt[-1] == P - 1)
    assert cut[-1] == 99 and short == [99] and len(cut) >= min(R, 2)
    assert len(prompt) + len(cut) <= limits[0]


def test_a_chat_template_that_refuses_names_the_prompt():
    with pytest.raises(ValueError, match="chat template refuses the prompt .*'content': 'q'.*: alternate"):
        tokenized([{"prompt": [user("q")], "responses": [assistant("c")]}], "{{ raise_exception('alternate') }}")


def test_errors_of_tokenizers_and_limits():
    chat = [{"prompt": [user("q")], "responses": [assistant("c")]}]
    with pytest.raises(ValueError, match="tokenizer: no chat_template"):
        tokenized(chat)
    with pytest.raises(ValueError, match="max_prompt_length: got 7 with max_length 8"):
        tokenized(chat, max_length=8, max_prompt_length=7)
    with pytest.raises(ValueError, match="max_prompt_length: got 7 without max_length"):
        tokenized(chat, max_prompt_length=7)
    without = tokenizer()
    without.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: no eos_token"):
        tokenize_groups(datasets.Dataset.from_list(chat), without)
