"""Files of every kind, compression and encoding; errors name the file and the row."""

import bz2
import csv
import gzip
import json
import lzma

import datasets
import pyarrow as pa
import pytest

from nca_kernels.integrations.data.load import load_groups


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


ROW = {"prompt": "2024-01-01", "responses": ["é", "b"], "scores": [0.5, 2.0]}  # a date that must stay a text
PAIR = {"prompt": "2024-01-01", "chosen": "é", "rejected": "b", "score_chosen": 8.5, "score_rejected": 3.0}
LINE = json.dumps(ROW, ensure_ascii=False) + "\n"


def compressed(suffix, data):
    if suffix == ".zst":
        return pa.compress(data, codec="zstd", asbytes=True)
    return {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix](data)


FORMS = {
    ".jsonl": LINE + "\n" + LINE,
    ".ndjson": LINE + LINE,
    ".json": json.dumps([ROW, ROW], ensure_ascii=False, indent=2),
    ".json lines": LINE + LINE,
    ".json one object": json.dumps(ROW, ensure_ascii=False, indent=2) + "\n" + json.dumps(ROW, ensure_ascii=False, indent=2),
    ".jsonl array": "\n [" + LINE + "," + LINE + "]\n",
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_and_compressions_of_json(tmp_path, form, suffix):
    path = tmp_path / f"data{form.split()[0]}{suffix}"
    path.write_bytes(compressed(suffix, FORMS[form].encode()))
    assert list(load_groups(path).rows) == [ROW, ROW]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("form", [".jsonl", ".json"])
def test_unicode_encodings(tmp_path, encoding, form):
    path = tmp_path / f"data{form}"
    path.write_bytes(FORMS[form].encode(encoding))
    assert list(load_groups(path).rows) == [ROW, ROW]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".csv.gz", ",")])
def test_tables_of_texts(tmp_path, suffix, delimiter, encoding):
    plain = tmp_path / "plain"
    with open(plain, "w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([PAIR.keys(), PAIR.values(), [*PAIR.values()], ["a,b\n\tc", 'say "x"', "[1]", "1", "2"]])
    path = tmp_path / f"data{suffix}"
    path.write_bytes(compressed(".gz" if suffix.endswith(".gz") else "", plain.read_bytes()))
    wanted = {"prompt": "2024-01-01", "responses": ["é", "b"], "scores": [8.5, 3.0]}
    last = {"prompt": "a,b\n\tc", "responses": ['say "x"', "[1]"], "scores": [1.0, 2.0]}
    assert list(load_groups(path).rows) == [wanted, wanted, last]


def test_lists_and_messages_in_a_table_of_texts(tmp_path):
    path = tmp_path / "data.csv"
    messages = [{"role": "user", "content": "q"}]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "responses", "scores"])
        writer.writerow([json.dumps(messages), json.dumps(["a", "b"]), "[1, 2.5]"])
        writer.writerow([str(messages), str(["a", "b"]), "[1, 2.5]"])  # as pandas writes them
    rows = load_groups(path).rows
    assert all(row["prompt"] == messages and row["scores"] == [1, 2.5] for row in rows)
    assert [[each["content"] for each in row["responses"]] for row in rows] == [["a", "b"]] * 2


def test_parquet_written_with_datasets_and_without(tmp_path):
    datasets.Dataset.from_list([ROW]).to_parquet(str(tmp_path / "a.parquet"))
    pa.parquet.write_table(pa.Table.from_pylist([ROW]), tmp_path / "b.parquet")
    for name in ("a", "b"):
        assert list(load_groups(tmp_path / f"{name}.parquet").rows) == [ROW]


def test_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data.jsonl").write_text(LINE)
    assert list(load_groups("~/data.jsonl").rows) == [ROW]


def test_a_file_that_changes_is_read_again(tmp_path):
    path = tmp_path / "data.jsonl"
    for text in ("a", "b"):
        path.write_text(json.dumps({**ROW, "prompt": text}) + "\n")
        assert load_groups(path).rows[0]["prompt"] == text


# Folders.


def test_a_folder_of_files_that_no_one_schema_holds(tmp_path):
    folder = tmp_path / "folder"
    (folder / "more").mkdir(parents=True)
    (folder / "a.jsonl").write_text(json.dumps({**ROW, "scores": [1, 2]}) + "\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((json.dumps({**ROW, "scores": [1.5, 2], "note": 1}) + "\n").encode()))
    (folder / "c.json").write_text(json.dumps([{**ROW, "note": "text"}]))
    (folder / "d.csv").write_text("prompt,responses,scores\n2024-01-01,\"['é', 'b']\",\"[3, 4]\"\n")
    datasets.Dataset.from_list([ROW]).to_parquet(str(folder / "more" / "e.parquet"))
    (folder / "empty.jsonl").write_text("")
    (folder / "README.md").write_text("# no data")
    (folder / ".hidden.jsonl").write_text("broken")
    rows = load_groups(folder).rows
    assert list(rows["scores"]) == [[1, 2], [1.5, 2], [0.5, 2], [3, 4], [0.5, 2]]
    assert set(rows["prompt"]) == {"2024-01-01"}


def test_splits_of_a_folder_by_the_names_of_its_files(tmp_path):
    for name in ("train-00000-of-00001.jsonl", "data/test-0.jsonl", "validation.jsonl", "train_prefs-0.jsonl"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**ROW, "prompt": name}) + "\n")
    folder = tmp_path / "folder"
    assert list(load_groups(folder, split="test").rows["prompt"]) == ["data/test-0.jsonl"]
    assert list(load_groups(folder, split="validation").rows["prompt"]) == ["validation.jsonl"]
    assert list(load_groups(folder, split="train_prefs").rows["prompt"]) == ["train_prefs-0.jsonl"]
    with pytest.raises(ValueError, match="no split 'dev', it has test, train, validation"):
        load_groups(folder, split="dev")


def test_a_folder_of_a_saved_dataset(tmp_path):
    one = datasets.Dataset.from_list([ROW])
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": one}).save_to_disk(str(tmp_path / "several"))
    assert list(load_groups(tmp_path / "one").rows) == [ROW]
    assert list(load_groups(tmp_path / "several", split="test").rows) == [ROW]
    with pytest.raises(ValueError, match="no split 'train', it has test"):
        load_groups(tmp_path / "several")


# What is wrong, by file and row.


def damaged(suffix):
    """The first half of a file of many different rows."""
    lines = "".join(json.dumps({**ROW, "prompt": f"{i} {hash(i) ** 7}"}) + "\n" for i in range(3000))
    data = compressed(suffix, lines.encode())
    return data[: len(data) // 2]


FAULTS = {
    "Latin-1": ("data.jsonl", LINE.encode() + LINE.encode("latin-1") + LINE.encode(), 2, "not UTF-8: byte 0xe9"),
    "Latin-1 table": (
        "data.csv",
        "prompt,chosen,rejected\nq,a,b\nq,é,b\nq,a,b\n".encode("latin-1"),
        2,
        "not UTF-8; save the file as UTF-8",
    ),
    "surrogate": (
        "data.jsonl",
        (LINE + json.dumps({**ROW, "responses": ["a", "\ud800"]}) + "\n" + LINE).encode(),
        2,
        r"column responses\[1\]: a lone surrogate",
    ),
    "surrogate in a prompt": (
        "data.jsonl",
        (LINE + json.dumps({**ROW, "prompt": "a\udfffb"}) + "\n" + LINE).encode(),
        2,
        "column prompt: a lone surrogate",
    ),
    "broken line": ("data.jsonl", (LINE + "{" + LINE + LINE).encode(), 2, "not JSON: "),
    "broken item": (
        "data.json",
        ("[" + LINE + "," + LINE + ", {'a': 1}, " + LINE + "]").encode(),
        3,
        "not JSON: .*nothing after it is read",
    ),
    "an item that is no object": ("data.json", ("[" + LINE + ", 7]").encode(), 2, "got int, wanted a JSON object"),
    "an array without an end": ("data.json", ("[" + LINE).encode(), 2, "not JSON: the array has no end"),
    "too many cells": ("data.csv", b"prompt,chosen,rejected\nq,a,b\nq,a,b,c\n", 2, "got 4 cells, wanted 3"),
    "cut-off gzip": ("data.jsonl.gz", damaged(".gz"), r"\d+", "cannot be read .*nothing after it is read|not JSON"),
    "cut-off xz": ("data.jsonl.xz", damaged(".xz"), r"\d+", "cannot be read .*nothing after it is read|not JSON"),
    "cut-off zstd": ("data.jsonl.zst", damaged(".zst"), r"\d+", "cannot be read .*nothing after it is read|not JSON"),
    "cut-off UTF-16": (
        "data.jsonl",
        (LINE + LINE).encode("utf-16")[:-1],
        r"\d+",
        "cannot be read .*nothing after it is read|not JSON",
    ),
    "no Parquet": ("data.parquet", b"PAR1 nothing", 1, "not Parquet"),
    "no gzip": ("data.jsonl.gz", LINE.encode(), 1, "cannot be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_bad_row(tmp_path, fault):
    name, data, row, problem = FAULTS[fault]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}: row {row}, .*({problem})"):
        load_groups(path)
    if b"PAR1" in data or fault == "no gzip":
        with pytest.raises(ValueError, match="no usable row"):
            load_groups(path, skip_bad_rows=True)
    else:
        assert len(load_groups(path, skip_bad_rows=True).rows) > 0


def test_a_bad_row_in_a_folder_is_named_by_its_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_text(LINE)
    (tmp_path / "folder" / "b.jsonl").write_text(LINE + "{\n")
    with pytest.raises(ValueError, match=r"folder/b.jsonl: row 2, not JSON"):
        load_groups(tmp_path / "folder")
    (place,) = load_groups(tmp_path / "folder", skip_bad_rows=True).skipped
    assert str(place).endswith("b.jsonl: row 2")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.jsonl", b"", "empty.jsonl: empty file"),
        ("empty.parquet", b"", "empty.parquet: empty file"),
        ("blank.jsonl", b"\n \n", "blank.jsonl: no usable row"),
        ("blank.json", b"[]", "blank.json: no usable row"),
        ("header.csv", b"prompt,chosen,rejected\n", "header.csv: no usable row"),
        ("notes.txt", b"text", "notes.txt: unknown kind of file, wanted .jsonl"),
        ("data", b"{}", "data: unknown kind of file"),
    ],
)
def test_files_without_rows(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_groups(tmp_path / name)


def test_what_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("nca_kernels.integrations.data.load.load_dataset", None)
    for name in ("gone.jsonl", "data/gone.ndjson.gz", "./gone", "~/gone", "/gone/gone"):
        with pytest.raises(FileNotFoundError, match="gone.*: no such file"):
            load_groups(name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder: no data in this folder, wanted files of"):
        load_groups(tmp_path / "folder")


def test_hub_names_have_configurations(monkeypatch):
    asked = []

    def load_dataset(name, config_name, *, split):
        asked.append((name, config_name, split))
        return datasets.Dataset.from_list([ROW])

    monkeypatch.setattr("nca_kernels.integrations.data.load.load_dataset", load_dataset)
    load_groups("some/name", split="test", config_name="comparisons")
    assert asked == [("some/name", "comparisons", "test")]
