"""The configuration of ``nca-kernels train``: a YAML file, and ``--key value`` on the command line, which override it."""

from __future__ import annotations

import difflib
import os
import shlex
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypedDict, get_type_hints

import yaml
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassFieldValidationError

from ..training.config import NCAConfig
from .other_names import OTHER_NAMES

# Keys that may name a file or a folder: a leading ~ is the user's home.
PATHS = frozenset(
    (
        *("model", "data", "eval_data", "tokenizer", "output_dir", "reference_cache_dir", "resume_from_checkpoint"),
        *("deepspeed", "fsdp_config", "accelerator_config"),
    )
)


class UsageError(Exception):
    """A key or value from the user is wrong. The message says which, where it was given and what was wanted."""


@dataclass
class Sources:
    """The sources of a run: its model and its data.

    Args:
        model: a folder or a name on the hub.
        data: what :func:`~nca_kernels.integrations.data.load.load_groups` takes; ``split`` of a folder or a hub name.
        config_name: of a hub name that has several configurations; of ``eval_data``, too.
        columns: the data's own names for ours (``{prompt: question, scores: ratings}``); of ``eval_data``, too.
        eval_data: the same, to evaluate on at the end and by ``eval_strategy``; ``eval_split`` of it.
        tokenizer: a folder or a name on the hub; ``None`` for the model's own.
        lora: keywords of ``peft.LoraConfig``; ``None`` to train the whole model.
    """

    model: str
    data: str
    split: str = "train"
    config_name: str | None = None
    columns: dict[str, str] | None = None
    eval_data: str | None = None
    eval_split: str = "test"
    tokenizer: str | None = None
    lora: dict[str, Any] | None = None


class Run(NamedTuple):
    """A run's configuration.

    Attributes:
        given: the keys that the user set. A default may depend on the data, but a set value may not.
        command: the command line that started the run.
    """

    sources: Sources
    config: NCAConfig
    given: frozenset[str]
    command: str


class _Given(NamedTuple):
    value: object  # as YAML reads it
    where: str
    text: str | None = None  # as it was written, on the command line


def read_run(path: str | os.PathLike, overrides: list[str]) -> Run:
    r"""Read a run from a YAML file, with ``--key value`` or ``--key=value`` words that override the file.

    The keys are those of :class:`Sources` and of :class:`~nca_kernels.integrations.NCAConfig`. Values on the command line are
    parsed as YAML; if that gives no value of the wanted type, the text itself is used.

    Raises:
        UsageError: a key is unknown (the message names the nearest known one) or missing; a value has a wrong type or is out of
            range.
        OSError: the file cannot be read.
    """
    given = {**_from_file(path), **_from_words(overrides)}
    # Wider types than transformers annotates: `true` means the last checkpoint, or FSDP as configured by fsdp_config.
    wider = dict.fromkeys(("resume_from_checkpoint", "fsdp"), bool | str | None)
    hints = {**_hints(Sources), **_hints(NCAConfig), **wider}
    values = _checked(given, hints)
    for key in ("model", "data"):
        if key not in values:
            raise UsageError(f"{path}: no {key}; wanted it there, or as --{key} on the command line")
    sources = Sources(**{key: value for key, value in values.items() if key in _hints(Sources)})
    if sources.lora is not None:
        sources.lora = _checked_lora(sources.lora, given["lora"].where)
    try:
        config = NCAConfig(**{key: value for key, value in values.items() if key in _hints(NCAConfig)})
    except (ValueError, TypeError) as error:
        raise UsageError(_with_key(str(error), given)) from error
    command = shlex.join(["nca-kernels", "train", os.fspath(path), *overrides])
    return Run(sources, config, frozenset(given), command)


def _with_key(message: str, given: dict[str, _Given]) -> str:
    """Put the place and the key before a message that names only a value, as transformers' messages about choices do."""
    for key, (value, where, _) in given.items():
        if isinstance(value, str) and value and message.startswith(f"{value} "):
            return f"{where}: {key}: {message}"
    return message


def _from_file(path: str | os.PathLike) -> dict[str, _Given]:
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.load(file, _UniqueKeys)
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 ({error}), wanted a YAML file in UTF-8") from error
        except yaml.YAMLError as error:
            raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: got {type(values).__name__}, wanted lines of key: value")
    return {str(key): _Given(value, str(path)) for key, value in values.items()}


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's loader, which silently takes the last of two equal keys; here they are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} occurs {keys.count(key)} times, wanted once")
        return super().construct_mapping(node, deep)


def _from_words(words: list[str]) -> dict[str, _Given]:
    given = {}
    remaining = iter(words)
    for word in remaining:
        if not word.startswith("--"):
            raise UsageError(f"command line: got {word!r}, wanted --key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            text = next(remaining, "--")
            if text.startswith("--"):
                raise UsageError(f"command line: --{key} has no value, wanted --{key} value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        given[key.replace("-", "_")] = _Given(value, "command line", text)
    return given


def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind) if field.init}


def _checked(given: dict[str, _Given], hints: dict[str, Any]) -> dict[str, Any]:
    for key, (_, where, _) in given.items():
        if key not in hints:
            raise UsageError(f"{where}: unknown key {key!r}; {_instead(key, hints)}")
    return {key: _typed(key, each, hints[key]) for key, each in given.items()}


def _instead(key: str, hints: dict[str, Any]) -> str:
    """The part of an error message that suggests a key for an unknown one."""
    if key in OTHER_NAMES and "model" in hints:
        return f"here it is {OTHER_NAMES[key]!r}"
    near = difflib.get_close_matches(key, hints, n=1, cutoff=0.6)
    return f"the nearest known one is {near[0]!r}" if near else "no known key is near it ('nca-kernels train --help' lists them)"


def _typed(key: str, given: _Given, hint: Any) -> object:
    """The first interpretation of the given value that has the wanted type."""
    readings = [given.value]
    if given.text is not None:
        readings.append(given.text)
    if isinstance(given.value, (int, str)) and not isinstance(given.value, bool):
        # A key of type float also takes 1, and 5e-6, which YAML 1.1 reads as text because it has no dot.
        readings += _float(given.value)
    if given.value is False and key.endswith("_strategy"):
        readings.append("no")  # YAML 1.1 reads `no` as false
    for reading in readings:
        try:
            validate_typed_dict(TypedDict("Wanted", {key: hint}), {key: reading})  # type: ignore[operator]  # a type made at run time
        except StrictDataclassFieldValidationError:
            continue
        return os.path.expanduser(reading) if key in PATHS and isinstance(reading, str) else reading
    wanted = hint.__name__ if isinstance(hint, type) else hint
    raise UsageError(f"{given.where}: {key}: got {given.value!r} ({type(given.value).__name__}), wanted {wanted}")


def _float(value: int | str) -> list[float]:
    try:
        return [float(value)]
    except ValueError:
        return []


def _checked_lora(lora: dict[str, Any], where: str) -> dict[str, Any]:
    from peft import LoraConfig

    return _checked({key: _Given(value, f"{where}: lora") for key, value in lora.items()}, _hints(LoraConfig))
