"""The command line: ``nca-kernels COMMAND``. Exit codes: 0, 1 for a failed run, 2 for usage."""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ._version import __version__

_HF = "pip install 'nca_kernels[hf]'"
_NETWORK = ("httpx", "httpx2", "httpcore", "huggingface_hub", "requests")  # packages whose errors are of a connection
_SERVER = "pip install 'nca_kernels[server]'"
_HF_MODULES = (
    "accelerate",
    "datasets",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "numpy",
    "peft",
    "pyarrow",
    "safetensors",
    "tqdm",
    "transformers",
    "xxhash",
    "yaml",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nca-kernels", description="Align language models with scored responses.")
    parser.add_argument("--version", action="version", version=f"nca_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add_command in (
        *(_add_sample, _add_rate, _add_inspect, _add_train, _add_score),
        *(_add_doctor, _add_demo, _add_reproduce),
    ):
        add_command(commands)
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.command == "inspect":  # its --rows may stand before or after the keys of the run
        arguments.overrides = overrides
    elif overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        return arguments.run(arguments) or 0
    # Errors that the user can correct. Any other may be a defect: its traceback is kept in a file.
    except ModuleNotFoundError as error:
        install = _SERVER if error.name == "openai" else _HF if error.name in _HF_MODULES else None
        return _failed(arguments.command, f"{error}" + (f"; install it with: {install}" if install else ""))
    except (_Mistake, OSError) as error:
        return _failed(arguments.command, str(error))
    except KeyboardInterrupt:
        print(f"\nnca-kernels {arguments.command}: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__module__.split(".")[0] in _NETWORK:
            return _failed(arguments.command, f"the network, or the hub: {error}")
        return _failed(arguments.command, f"{type(error).__name__}: {error} (not foreseen; the traceback is in {_kept(error)})")


class _Mistake(Exception):
    """What is wrong with the user's files or settings, in one line."""


@contextmanager
def _mistakes(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds are raised of what the user gave, and hold no traceback worth keeping."""
    try:
        yield
    except kinds as error:
        raise _Mistake(str(error)) from error


def _kept(error: Exception) -> str:
    """The file in which the traceback is kept."""
    with tempfile.NamedTemporaryFile("w", prefix="nca-kernels-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    return file.name


def _failed(command: str, reason: str) -> int:
    print(f"nca-kernels {command}: {' '.join(reason.split())}", file=sys.stderr)
    return 1


def _positive(kind: type) -> Callable[[str], float]:
    """An argparse type: a number of this kind, > 0."""

    def positive(text: str) -> float:
        number = kind(text)
        if not number > 0:
            raise argparse.ArgumentTypeError(f"got {text}, wanted a number > 0")
        return number

    return positive


def _mapping(text: str) -> dict[str, object]:
    """An argparse type: a mapping as YAML has it."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a mapping: '{{key: value}}'")
    return value


def _between(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a number in ``[low, high]``, or with ``above`` in ``(low, high]``."""

    def between(text: str) -> float:
        number = float(text)
        if not (low < number if above else low <= number) or not number <= high:
            raise argparse.ArgumentTypeError(f"got {text}, wanted a number {'above' if above else 'from'} {low} up to {high}")
        return number

    return between


def _add_train(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser(
        "train",
        add_help=False,  # the list of keys needs transformers, so it is printed only for --help
        help="align a model with scored responses, as a YAML file says",
        usage="nca-kernels train CONFIG [--KEY VALUE ...]",
        description="Align a model with scored responses. 'nca-kernels train --help' lists the keys (docs/guide.md has examples).",
    )
    train.add_argument("-h", "--help", action=_TrainHelp, nargs=0, help="show this and all keys")
    train.add_argument("config", metavar="CONFIG", help="a YAML file of key: value")
    train.add_argument("overrides", metavar="--KEY VALUE", nargs=argparse.REMAINDER, help="values that override those of the file")
    train.set_defaults(run=_train, parser=train)


class _TrainHelp(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        _print_train_help(parser)
        parser.exit()


def _print_train_help(parser: argparse.ArgumentParser) -> None:
    from .integrations.commands.help import train_keys

    print(f"{parser.format_help()}{train_keys()}", end="")


def _train(arguments: argparse.Namespace) -> int | None:
    # Imported when the command runs, here and below: it loads transformers, which other commands and --help do not need.
    from .integrations.commands.run_config import UsageError, read_run

    if {"-h", "--help"} & set(arguments.overrides):
        _print_train_help(arguments.parser)
        return None
    try:
        run = read_run(arguments.config, arguments.overrides)
    except UsageError as error:
        arguments.parser.error(str(error))
    from .integrations.commands.train import prepare, train

    with _mistakes(ValueError, RuntimeError):  # the data, the model, the machine, or these together
        trainer = prepare(run)
    try:
        with _mistakes(ValueError, FloatingPointError):  # a checkpoint that cannot be resumed; a loss that is not finite
            train(trainer, run)
    except KeyboardInterrupt:
        print(f"\nnca-kernels train: stopped; {_how_to_go_on(run.config.output_dir)}", file=sys.stderr)
        return 130
    return None


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="what a run would train on: layout, lengths, scores, decoded rows and warnings",
        usage="nca-kernels inspect CONFIG [--rows N] [--KEY VALUE ...]",
        allow_abbrev=False,
        description="What `nca-kernels train CONFIG` would train on. Loads data and tokenizer, no weights.",
    )
    inspect.add_argument("config", metavar="CONFIG", help="a YAML file of key: value")
    inspect.add_argument("--rows", type=_positive(int), default=1, help="how many rows to decode (%(default)s)")
    inspect.set_defaults(run=_inspect, parser=inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    from .integrations.commands.run_config import UsageError, read_run

    try:
        run = read_run(arguments.config, arguments.overrides)
    except UsageError as error:
        arguments.parser.error(str(error))
    from .integrations.commands.inspect import inspect_run

    with _mistakes(ValueError):
        inspect_run(run, rows=arguments.rows)


def _how_to_go_on(output_dir: str) -> str:
    if any(Path(output_dir).glob("checkpoint-*")):
        return "the same command with --resume_from_checkpoint true continues from the last checkpoint"
    return "there is no checkpoint yet to continue from (save_steps says how often one is written)"


def _add_score(commands: argparse._SubParsersAction) -> None:
    score = commands.add_parser(
        "score",
        help="log-probs and implicit rewards of a data set's responses",
        description="The log-prob of each response under a model, and, beside a reference model, its implicit reward "
        "beta * (log p - log p_ref), as JSONL beside the input's columns; at the end, how well their order follows the scores.",
    )
    score.add_argument("--model", required=True, help="a folder or a name on the hub")
    score.add_argument("--data", required=True, help="a file, folder or hub name, as for train; scores may be missing")
    score.add_argument("--split", default="train", help="the split of a folder or hub name (%(default)s)")
    score.add_argument("--ref-model", help="the reference model, for the implicit rewards")
    score.add_argument("--max-length", type=_positive(int), help="the most tokens of a prompt with a response (as in training)")
    score.add_argument(
        "--model-init-kwargs", type=_mapping, help="keywords of from_pretrained, as in YAML: '{dtype: bfloat16}' (as in training)"
    )
    score.add_argument("--beta", type=_positive(float), default=0.1, help="strength of the implicit rewards (%(default)s)")
    score.add_argument("--average", action="store_true", help="log-probs as averages over a response's tokens, not as sums")
    score.add_argument("--batch-size", type=_positive(int), default=4, help="prompts at a time (%(default)s)")
    score.add_argument("--out", type=Path, default=Path("scored.jsonl"), help="the file to write (%(default)s)")
    score.set_defaults(run=_score)


def _score(arguments: argparse.Namespace) -> None:
    from .integrations.commands.score import score_file

    options = {name: value for name, value in vars(arguments).items() if name not in ("command", "run")}
    with _mistakes(ValueError):
        score_file(**options)


def _add_sample(commands: argparse._SubParsersAction) -> None:
    sample = commands.add_parser(
        "sample",
        help="sample responses to a file's prompts, by a model or a server",
        description="Sample responses to each prompt of a file and write them beside it, with a flag for those that the model "
        "ended. A killed command continues where it stopped when it is called again.",
    )
    sample.add_argument("--model", required=True, help="a folder or a name on the hub; with --server, the server's name for it")
    sample.add_argument("--data", required=True, type=Path, help="a file of rows with a prompt, a text or messages")
    sample.add_argument("--out", required=True, type=Path, help="the file to write, as JSON Lines")
    sample.add_argument("--num-responses", type=_positive(int), default=4, help="responses to each prompt (%(default)s)")
    sample.add_argument("--temperature", type=_between(0, 100), default=1.0, help="0: the likeliest tokens (%(default)s)")
    sample.add_argument(
        "--top-p", type=_between(0, 1, above=True), default=1.0, help="probability of the tokens kept (%(default)s)"
    )
    sample.add_argument("--max-new-tokens", type=_positive(int), default=512, help="most tokens of a response (%(default)s)")
    sample.add_argument("--stop", action="append", default=[], metavar="TEXT", help="a response ends before it; may be repeated")
    sample.add_argument("--batch-size", type=_positive(int), default=8, help="responses, or requests, at a time (%(default)s)")
    sample.add_argument("--seed", type=int, default=0, help="seed of the random numbers (%(default)s)")
    sample.add_argument("--server", metavar="URL", help="base URL of an OpenAI-compatible server, as http://localhost:8000/v1")
    sample.set_defaults(run=_sample)


def _sample(arguments: argparse.Namespace) -> None:
    from .integrations.commands.sample import sample_file
    from .integrations.models.sampling import Sampling

    sampling = Sampling(arguments.temperature, arguments.top_p, arguments.max_new_tokens, arguments.seed, tuple(arguments.stop))
    options = {name: getattr(arguments, name) for name in ("num_responses", "batch_size", "server")}
    with _mistakes(ValueError):
        sample_file(arguments.model, arguments.data, arguments.out, sampling=sampling, **options)


def _add_rate(commands: argparse._SubParsersAction) -> None:
    rate = commands.add_parser(
        "rate",
        help="score a file's responses, by a reward model or a Python function",
        description="Write a file with a score for each of its responses; existing scores are kept as old_scores. A killed "
        "command continues where it stopped when it is called again.",
    )
    rate.add_argument("--data", required=True, type=Path, help="a file of rows with prompt and responses, as sample writes it")
    rate.add_argument("--out", required=True, type=Path, help="the file to write, as JSON Lines")
    by = rate.add_mutually_exclusive_group(required=True)
    by.add_argument("--reward-model", help="a sequence-classification model of one output; a folder or a name on the hub")
    by.add_argument("--function", metavar="FILE.py:NAME", help="a function of (prompt, responses) that returns the scores")
    rate.add_argument("--batch-size", type=_positive(int), default=8, help="responses at a time (%(default)s)")
    rate.set_defaults(run=_rate)


def _rate(arguments: argparse.Namespace) -> None:
    from .integrations.commands.rate import rate_file

    options = {name: getattr(arguments, name) for name in ("reward_model", "function", "batch_size")}
    with _mistakes(ValueError):
        rate_file(arguments.data, arguments.out, **options)


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="versions, what was built, which backend runs where and why, and a check of each against float64",
        description="What is installed and built, which backend runs where and why each other would not, and a check of every "
        "backend that runs here against float64. Exit code 1 if one fails it.",
    )
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int | None:
    from .doctor import examine

    return None if examine() else _failed("doctor", "a backend failed the self-check")


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo",
        help="align a small Llama by NCA, InfoNCA and DPO, in about three minutes",
        description="Teach a small Llama sums, sample four answers a prompt, reward them, and align it by NCA, InfoNCA "
        "and DPO. Prints a table; writes figure2.png and demo.json.",
    )
    demo.add_argument("--path", choices=("linear", "logits"), default="linear", help="log-probs without or with logits")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="the output folder (%(default)s)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--quick", action="store_true", help="a run of a few seconds, too short to learn, as a check")
    demo.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    from .experiments.demo import QUICK, Size, run_demo

    run_demo(arguments.out, path=arguments.path, seed=arguments.seed, size=QUICK if arguments.quick else Size())


def _add_reproduce(commands: argparse._SubParsersAction) -> None:
    reproduce = commands.add_parser(
        "reproduce",
        help="the paper's experiments in small: hours on two cores, continued where they stopped",
        description="The claims of the paper, asked of small models whose true reward is known (docs/protocol.md). Every run is "
        "kept in OUT/runs as it ends; a later call does those that are missing.",
    )
    questions = ("figure2", "table1", "table2", "table3", "optimum", "frontier", "settings", "all")
    reproduce.add_argument("what", nargs="?", choices=questions, default="all")
    reproduce.add_argument("--out", type=Path, default=Path("out/reproduce"), help="the output folder (%(default)s)")
    reproduce.add_argument("--workers", type=_positive(int), help="runs side by side (one a core)")
    reproduce.add_argument("--quick", action="store_true", help="one seed and a few steps, as a check; its results mean nothing")
    reproduce.set_defaults(run=_reproduce)


def _reproduce(arguments: argparse.Namespace) -> None:
    from .experiments.reproduce import run

    run(arguments.what, arguments.out, arguments.quick, arguments.workers or 0)
