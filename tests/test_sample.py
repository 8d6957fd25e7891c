"""nca-kernels sample: the responses, their seeds, resuming, and a server that fails in every way."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from nca_kernels import cli
from nca_kernels.integrations.commands import server as server_module
from nca_kernels.integrations.models.sampling import Sampling, end_tokens, sample_responses

ROOT = Path(__file__).parents[1]
PROMPTS = [
    {"prompt": "ab", "id": 1},
    {"prompt": [{"role": "user", "content": "a longer question?"}], "id": 2},
    {"prompt": "x", "id": 3, "answer": "é"},
    {"prompt": [{"role": "user", "content": "q"}], "system": "be short", "id": 4},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    save_tiny_model(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return file


def read(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def sample(model, data, out, *options):
    arguments = ["sample", "--model", str(model), "--data", str(data), "--out", str(out), "--max-new-tokens", "12", *options]
    return cli.main(arguments)


def test_every_row_gets_its_responses_and_keeps_its_columns(model, data, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    assert sample(model, data, out, "--num-responses", "3") == 0
    rows = read(out)
    assert [{name: row[name] for name in given} for row, given in zip(rows, PROMPTS, strict=True)] == PROMPTS
    assert all(len(row["responses"]) == len(row["finished"]) == 3 for row in rows)
    assert not (tmp_path / "answers.jsonl.part").exists()
    assert "4 prompts, 3 responses each" in capsys.readouterr().out


def test_a_seed_gives_the_same_text_at_any_batch_size(model, data, tmp_path):
    made = []
    for size in (1, 3, 12):
        sample(model, data, tmp_path / f"{size}.jsonl", "--num-responses", "3", "--batch-size", str(size), "--seed", "5")
        made.append(read(tmp_path / f"{size}.jsonl"))
    assert made[0] == made[1] == made[2]
    sample(model, data, tmp_path / "other.jsonl", "--num-responses", "3", "--seed", "6")
    assert read(tmp_path / "other.jsonl") != made[0]
    assert len(set(made[0][0]["responses"])) == 3, "each response has random numbers of its own"


def test_samples_have_the_models_probabilities(model):
    """The share of each first token is its probability, also if top_p excludes some tokens."""
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        network.lm_head.weight.mul_(0).add_(0)
        network.lm_head.weight[3:7] = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
        ids = tokenizer("ab")["input_ids"]
        logits = network(torch.tensor([ids])).logits[0, -1].double()
    p = (logits / 0.7).softmax(-1)
    ends = end_tokens(network, tokenizer)
    for top_p in (1.0, 0.5):
        sampling = Sampling(temperature=0.7, top_p=top_p, max_new_tokens=1)
        n = 3000
        drawn = [s.text for s in sample_responses(network, tokenizer, [ids] * n, [(i, 0) for i in range(n)], sampling, ends)]
        order = p.argsort(descending=True)
        kept = order[: int((p[order].cumsum(0) < top_p).sum()) + 1]
        wanted = torch.zeros_like(p)
        wanted[kept] = p[kept] / p[kept].sum()
        likeliest = int(kept[0])
        share = drawn.count(tokenizer.decode([likeliest], skip_special_tokens=True)) / n
        q = float(wanted[likeliest])
        if likeliest not in tokenizer.all_special_ids:
            assert abs(share - q) < 5 * (q * (1 - q) / n) ** 0.5 + 1e-9


def test_temperature_0_takes_the_likeliest_tokens(model, data, tmp_path):
    sample(model, data, tmp_path / "a.jsonl", "--num-responses", "2", "--temperature", "0")
    assert all(row["responses"][0] == row["responses"][1] for row in read(tmp_path / "a.jsonl"))
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    ids = tokenizer("ab", return_tensors="pt")["input_ids"]
    for _ in range(12):
        ids = torch.cat([ids, network(ids).logits[:, -1:].argmax(-1)], 1)
    text = tokenizer.decode(ids[0, 2:], skip_special_tokens=False).split("</s>")[0]
    assert read(tmp_path / "a.jsonl")[0]["responses"][0] == tokenizer.decode(
        tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True
    )


def test_finished_says_whether_the_model_ended(model, data, tmp_path):
    out = tmp_path / "a.jsonl"
    sample(model, data, out, "--num-responses", "40", "--batch-size", "160")
    rows = read(out)
    flags = [flag for row in rows for flag in row["finished"]]
    assert any(flags) and not all(flags)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row in rows:
        for text, finished in zip(row["responses"], row["finished"], strict=True):
            # Bytes that form no character decode to a mark that encodes to three.
            if "\ufffd" not in text:
                assert finished == (len(tokenizer(text)["input_ids"]) < 12) or "<|" in tokenizer.decode(
                    tokenizer(text)["input_ids"]
                )


def test_stop_strings_end_a_response_before_them(model, data, tmp_path):
    sample(model, data, tmp_path / "a.jsonl", "--num-responses", "20")
    letters = [text[3] for row in read(tmp_path / "a.jsonl") for text in row["responses"] if len(text) > 6 and text[3].isascii()]
    stop = max(set(letters), key=letters.count)
    sample(model, data, tmp_path / "b.jsonl", "--num-responses", "20", "--stop", stop)
    for a, b in zip(read(tmp_path / "a.jsonl"), read(tmp_path / "b.jsonl"), strict=True):
        for free, stopped, finished in zip(a["responses"], b["responses"], b["finished"], strict=True):
            assert stopped == free.split(stop)[0]
            assert finished or stop not in free


def test_the_end_of_a_templates_turn_ends_a_response(model):
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages %}<|user|>{{ m['content'] }}<|assistant|>{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    assert end_tokens(network, tokenizer) == [0, tokenizer.convert_tokens_to_ids("<|assistant|>")]


# --- resuming --------------------------------------------------------------------------------------------------------


def test_a_killed_command_goes_on(model, tmp_path):
    data, out, whole = tmp_path / "p.jsonl", tmp_path / "a.jsonl", tmp_path / "whole.jsonl"
    data.write_text("".join(json.dumps({"prompt": "a" * (1 + i % 7)}) + "\n" for i in range(40)))
    arguments = ["sample", "--model", model, "--data", str(data), "--max-new-tokens", "8", "--batch-size", "4"]
    begun = subprocess.Popen(
        [sys.executable, "-m", "nca_kernels", *arguments, "--out", str(out)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    part = tmp_path / "a.jsonl.part"
    deadline = time.monotonic() + 120
    while (not part.exists() or part.read_bytes().count(b"\n") < 4) and begun.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    assert not out.exists() and part.exists()
    done = part.read_bytes().count(b"\n") - 1
    with part.open("ab") as file:
        file.write(b'{"row": 40, "line": {"prompt": "half of a li')
    assert cli.main([*arguments, "--out", str(out)]) == 0
    assert cli.main([*arguments, "--out", str(whole)]) == 0
    assert read(out) == read(whole) and len(read(out)) == 40 and 3 <= done <= 40


def test_lines_made_with_other_settings_are_refused(model, data, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    sample(model, data, out, "--num-responses", "2")
    made = out.read_text()
    assert sample(model, data, out, "--num-responses", "2") == 1
    assert "exists; wanted a new file" in capsys.readouterr().err and out.read_text() == made
    settings = {"model": str(model), "data": "other", "num_responses": 2, "server": None, **Sampling(max_new_tokens=12)._asdict()}
    out.unlink()
    (tmp_path / "a.jsonl.part").write_text(json.dumps(settings) + "\n")
    assert sample(model, data, out, "--num-responses", "2") == 1
    assert "data: got" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, problem",
    [
        ('{"prompt": ""}', "row 2, column prompt: empty text"),
        ('{"question": "q"}', "row 2, column prompt: missing"),
        ('{"prompt": [{"content": "q"}]}', "row 2, column prompt"),
        ('{"prompt": ', "row 2, not JSON"),
        ("[1]", "row 2"),
    ],
)
def test_a_bad_row_is_named(line, problem, model, tmp_path, capsys):
    data = tmp_path / "p.jsonl"
    data.write_text('{"prompt": "a"}\n' + line + "\n")
    assert sample(model, data, tmp_path / "a.jsonl") == 1
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1


def test_a_prompt_too_long_for_the_model_is_named(model, tmp_path, capsys):
    data = tmp_path / "p.jsonl"
    data.write_text(json.dumps({"prompt": "a" * 505}) + "\n")
    assert sample(model, data, tmp_path / "a.jsonl") == 1
    assert "row 1: its prompt has 505 tokens, and with 12 new ones that is more than the model's 512" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--temperature", "-1"), ("--top-p", "0"), ("--top-p", "1.5"), ("--num-responses", "0")])
def test_usage_errors_exit_with_2(option, model, data, tmp_path):
    with pytest.raises(SystemExit) as error:
        sample(model, data, tmp_path / "a.jsonl", *option)
    assert error.value.code == 2


# --- a server --------------------------------------------------------------------------------------------------------


class Unreliable(BaseHTTPRequestHandler):
    """Answers with the prompt and the seed, after the failures that the test has listed for this request."""

    protocol_version = "HTTP/1.1"
    failures: dict[str, list[str]] = {}
    log: list[dict] = []
    under_way = most_under_way = 0
    lock = threading.Lock()

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request.get("prompt") or request["messages"][-1]["content"]
        cls = type(self)
        with cls.lock:
            cls.under_way += 1
            cls.most_under_way = max(cls.most_under_way, cls.under_way)
            failures = cls.failures.setdefault(prompt, [])
            failure = failures.pop(0) if failures else None
        try:
            time.sleep(0.01)
            self.answer(request, prompt, failure)
        finally:
            with cls.lock:
                cls.under_way -= 1

    def answer(self, request, prompt, failure):
        if failure in ("429", "500", "503", "400"):
            self.reply(int(failure), json.dumps({"error": {"message": f"no: {failure}"}}).encode())
            return
        text = f"{prompt}/{request['seed']}"
        choice = {"index": 0, "finish_reason": "length" if failure == "length" else "stop"}
        choice |= {"text": text} if "prompt" in request else {"message": {"role": "assistant", "content": text}}
        kind = "text_completion" if "prompt" in request else "chat.completion"
        answer = {"id": "1", "object": kind, "created": 0, "model": request["model"], "choices": [choice]}
        body = json.dumps(answer).encode()
        if failure == "slow":
            time.sleep(2)
        if failure == "cut off":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        if failure == "no choices":
            body = json.dumps({**answer, "choices": []}).encode()
        if failure is None or failure == "length":
            with type(self).lock:
                self.log.append(request)
        self.reply(200, body)

    def reply(self, status, body):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", "0.01")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def serving(failures):
    handler = type("Handler", (Unreliable,), {"failures": failures, "log": [], "lock": threading.Lock()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *args: None  # of clients that have gone
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", handler
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def impatient(monkeypatch):
    pytest.importorskip("openai", reason="openai is not installed")
    own = server_module.Server
    monkeypatch.setattr("nca_kernels.integrations.commands.server.Server", lambda *args: own(*args, first_wait=0.01, timeout=1.0))


def test_a_server_that_fails_in_passing_is_asked_again(impatient, data, tmp_path):
    failures = {
        "ab": ["429", "500", "cut off"],
        "a longer question?": ["503", "no choices"],
        "x": ["slow"],
        "q": ["length", "length", "length"],
    }
    with serving(failures) as (url, handler):
        assert sample("m", data, tmp_path / "a.jsonl", "--num-responses", "3", "--server", url, "--batch-size", "2") == 0
    rows = read(tmp_path / "a.jsonl")
    assert handler.most_under_way <= 2
    assert [[text.split("/")[0] for text in row["responses"]] for row in rows] == [
        [prompt] * 3 for prompt in ("ab", "a longer question?", "x", "q")
    ]
    assert all(len(set(row["responses"])) == 3 for row in rows), "each response has a seed of its own"
    assert [row["finished"] for row in rows] == [[True] * 3] * 3 + [[False] * 3]
    assert len(handler.log) == 12, "no answer is asked for twice"
    assert rows[3]["system"] == "be short"
    first = next(request for request in handler.log if request.get("messages") and len(request["messages"]) == 2)
    assert [message["role"] for message in first["messages"]] == ["system", "user"]


def test_a_server_that_goes_on_failing_ends_the_command_and_loses_nothing(impatient, data, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    with serving({"q": ["500"] * 100}) as (url, handler):
        options = ("--num-responses", "1", "--server", url, "--batch-size", "1")
        assert sample("m", data, out, *options) == 1
        error = capsys.readouterr().err
        assert "row 4 failed 6 times, the last time with: Error code: 500" in error.splitlines()[-1] and "Traceback" not in error
        handler.failures.clear()
        asked = len(handler.log)
        assert asked == 3 and sample("m", data, out, *options) == 0
        assert len(handler.log) == 4, "finished rows are not asked for again"
    assert len(read(out)) == 4


def test_what_a_server_refuses_is_not_tried_again(impatient, data, tmp_path, capsys):
    with serving({"ab": ["400"] * 100}) as (url, handler):
        assert sample("m", data, tmp_path / "a.jsonl", "--server", url, "--batch-size", "1") == 1
        assert len(handler.failures["ab"]) == 99
    assert "refused row 1" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_named(impatient, data, tmp_path, capsys):
    url = "http://127.0.0.1:9/v1"
    assert sample("m", data, tmp_path / "a.jsonl", "--server", url) == 1
    error = capsys.readouterr().err
    assert url in error and "failed 6 times" in error


@pytest.mark.long
def test_transformers_serve(model, tmp_path):
    """A real server on the loopback."""
    for package in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    data = tmp_path / "p.jsonl"
    data.write_text(json.dumps({"prompt": [{"role": "user", "content": "q"}]}) + "\n")
    port = "18473"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", model, "--host", "127.0.0.1", "--port", port]
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    try:
        out = tmp_path / "a.jsonl"
        deadline = time.monotonic() + 180
        options = ("--num-responses", "2", "--server", f"http://127.0.0.1:{port}/v1")
        while sample(model, data, out, *options) != 0:
            assert server.poll() is None and time.monotonic() < deadline, "the server does not answer"
            time.sleep(2)
    finally:
        server.terminate()
        server.wait()
    (row,) = read(out)
    assert len(row["responses"]) == len(row["finished"]) == 2
