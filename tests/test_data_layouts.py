"""Every layout of the table, tested with rows that have the columns of public data sets, from every kind of source."""

import json
from pathlib import Path

import datasets
import pytest
from layout_rows import ROWS, TOOL, Q, system

from nca_kernels.integrations.data.layouts import LAYOUTS, table
from nca_kernels.integrations.data.load import load_groups


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def sources(tmp_path, rows):
    """The rows as a Dataset, as JSONL and as Parquet."""
    table = datasets.Dataset.from_list(rows)
    lines, parquet = tmp_path / "data.jsonl", tmp_path / "data.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table.to_parquet(str(parquet))
    return {"dataset": table, "jsonl": str(lines), "parquet": str(parquet)}


def texts(responses):
    return [response if isinstance(response, str) else response["content"] for response in responses]


def test_every_layout_of_the_table_has_a_row_here():
    assert list(ROWS) == [layout.name for layout in LAYOUTS]


CASES = [(name, i) for name, rows in ROWS.items() for i in range(len(rows))]


@pytest.mark.parametrize(("name", "i"), CASES, ids=[f"{name}-{i}" for name, i in CASES])
def test_public_columns(tmp_path, name, i):
    row, (prompt, responses, scores) = ROWS[name][i]
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    for source in sources(tmp_path, [row]).values():
        groups = load_groups(source)
        (group,) = groups.rows
        assert group["prompt"] == prompt
        assert texts(group["responses"]) == list(responses) and group["scores"] == scores
        assert groups.layout.startswith(layout.described())
        assert groups.preference == (layout.unit == "preference")
        if row.get("tools"):
            assert group["tools"] == [TOOL]
        if layout.reads == "label":
            assert group["desirable"] == [scores[0] == 1]


def test_one_response_a_row_becomes_one_row_a_prompt(tmp_path):
    rows = [
        {"prompt": p, "response": r, "helpfulness": s} for p, r, s in (("q", "a", 3), ("q", "b", 1), ("p", "c", 2), ("q", "d", 4))
    ]
    for source in sources(tmp_path, rows).values():
        made = load_groups(source).rows
        assert [(texts(row["responses"]), row["scores"]) for row in made] == [(["a", "b"], [3, 1]), (["c"], [2]), (["d"], [4])]


def test_of_two_layouts_the_one_with_more_scores_and_it_says_so(tmp_path, caplog):
    caplog.set_level("INFO", logger="nca_kernels")
    row, _ = ROWS["on_policy"][0]
    for source in sources(tmp_path, [row]).values():
        caplog.clear()
        groups = load_groups(source)
        assert groups.layout.endswith("(also fits pairs (chosen, rejected), with fewer scores)")
        (line,) = [record.message for record in caplog.records if "layout" in record.message]
        assert "on_policy: all_generated_responses with all_rm_scores" in line


def test_ranks_become_scores_and_the_line_says_so():
    assert "ranks 1, 2, ... become scores -1, -2, ..." in load_groups([ROWS["nectar"][0][0]]).layout


def test_scores_that_one_row_lacks_do_not_make_it_a_preference(tmp_path):
    scored = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 8.0, "score_rejected": 3.0}
    bare = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": None, "score_rejected": None}
    for source in sources(tmp_path, [bare, scored, bare]).values():
        with pytest.raises(ValueError, match=r"row 1, column chosen, rejected with score_chosen.*: missing.*1 more bad row"):
            load_groups(source)
        groups = load_groups(source, skip_bad_rows=True)
        assert list(groups.rows["scores"]) == [[8, 3]] and not groups.preference


COLUMNS = [
    (
        {"question": "q", "answers": ["a", "b"], "ratings": [1, 2]},
        {"prompt": "question", "responses": "answers", "scores": "ratings"},
    ),
    (
        {"question": "q", "answers": [{"t": "a", "by": {"n": 1.0}}, {"t": "b", "by": {"n": 2.0}}]},
        {"prompt": "question", "responses": "answers.t", "scores": "answers.by.n"},
    ),
    ({"x": {"y": "q"}, "good": "a", "bad": "b"}, {"prompt": "x.y", "chosen": "good", "rejected": "bad"}),
    # The mapping wins over columns that are known.
    (
        {"prompt": "not this", "q": "q", "chosen": "x", "rejected": "y", "r": ["a", "b"], "s": [1.0, 2.0]},
        {"prompt": "q", "responses": "r", "scores": "s"},
    ),
    ({"question": "q", "response": "a", "quality": 3.0}, {"prompt": "question", "response": "response", "score": "quality"}),
    ({"prompt": "q", "response": "a", "helpfulness": 0, "correctness": 4}, {"score": "correctness"}),
    ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 2], "sys": "s"}, {"system": "sys"}),
]


@pytest.mark.parametrize(("row", "columns"), COLUMNS)
def test_columns_map_names_and_dotted_paths(tmp_path, row, columns):
    for source in sources(tmp_path, [row]).values():
        (group,) = load_groups(source, columns=columns).rows
        assert group["prompt"] in ("q", Q, [system("s"), *Q])
        assert texts(group["responses"]) == ["a", "b"][: len(group["scores"])] and all(group["scores"]) is ("good" not in row)


def test_columns_that_name_nothing():
    row = {"prompt": "q", "responses": ["a"], "scores": [1]}
    with pytest.raises(ValueError, match="columns: got reponses, wanted of prompt"):
        load_groups([row], columns={"reponses": "responses"})
    with pytest.raises(ValueError, match="row 1, column gone: missing, wanted as scores by columns"):
        load_groups([row], columns={"scores": "gone"})
    with pytest.raises(TypeError, match="columns: got 'prompt', wanted our names"):
        load_groups([row], columns="prompt")


def test_the_documentation_has_the_table():
    assert table() in (Path(__file__).parents[1] / "docs" / "data.md").read_text()
