"""Six chat templates from TRL: ids, labels and log-probs against the test's own rendering and model."""

import copy
import re
from pathlib import Path

import datasets
import jinja2
import jinja2.ext
import jinja2.sandbox
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nca_kernels.integrations.data.collator import IGNORE_INDEX, GroupCollator, group_logps
from nca_kernels.integrations.data.load import load_groups
from nca_kernels.integrations.data.shared_prompt import model_inputs
from nca_kernels.integrations.data.tokenize import tokenize_groups
from nca_kernels.integrations.models.heads import model_logps

trl = pytest.importorskip("trl", reason="TRL, whose templates these are, is not installed")

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEXT = [path.read_text() for path in sorted((Path(__file__).parents[1] / "docs").glob("*.md"))]
# What each template writes after a response; where that is nothing, the end-of-sequence token ends it.
ENDS = {
    "llama3": "<|eot_id|>",
    "qwen2_5": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>\n</s>",
    "qwen3": "<|im_end|>",
    "glm4moe": "",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch, default_dispatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def tokenizer(name):
    """A byte-level BPE tokenizer, trained on the documentation, in which the template's marks are single tokens."""
    template = (FOLDER / f"{name}.jinja").read_text()
    marks = sorted(set(re.findall(r"<\|\w+\|>|<\w+_of_\w+>|</?think>", template)))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", additional_special_tokens=marks
    )
    made.chat_template = template
    return made


def rendered(made, messages, generate):
    """The template, rendered independently of the package."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )

    def raise_exception(message):
        raise AssertionError(message)

    variables = {"bos_token": "<s>", "eos_token": "</s>", "raise_exception": raise_exception}
    return environment.from_string(made.chat_template).render(messages=messages, add_generation_prompt=generate, **variables)


def rows(name):
    system = [] if name == "gemma" else [{"role": "system", "content": "Answer in one line."}]
    turns = [
        {"role": "user", "content": "What is the loss?"},
        {"role": "assistant", "content": "A number."},
        {"role": "user", "content": "And the score,\nthen?"},
    ]
    answers = ["An explicit reward.", "It is 0.5: é, \u4e2d.", "No\n\n- idea"]
    return [
        {"prompt": system + turns, "responses": answers, "scores": [2.0, 1.0, 0.0]},
        {"prompt": turns[:1], "responses": answers[:2], "scores": [0.0, 1.0]},
    ]


def expected(made, name, row):
    """The ids of prompt and response, split at the character where the prompt ends in the rendering of both."""
    alone = rendered(made, row["prompt"], True)
    ids = []
    for answer in row["responses"]:
        whole = rendered(made, [*row["prompt"], {"role": "assistant", "content": answer}], False).rstrip()
        assert whole.startswith(alone) and answer in whole[len(alone) :] and whole.endswith(answer + ENDS[name])
        encoding = made.backend_tokenizer.encode(whole, add_special_tokens=False)
        # A token's place; of a character in several tokens each has the character's.
        border = next(i for i, (start, _) in enumerate(encoding.offsets) if start >= len(alone))
        ids.append((encoding.ids[:border], encoding.ids[border:] + ([] if ENDS[name] else [made.eos_token_id])))
    assert all(prompt == ids[0][0] for prompt, _ in ids)
    return ids[0][0], [response for _, response in ids]


@pytest.mark.parametrize("layout", ["padded", "share_prompt"])
@pytest.mark.parametrize("name", ENDS)
def test_ids_labels_and_log_probs(name, layout):
    made, given = tokenizer(name), rows(name)
    tokenized = tokenize_groups(load_groups(given), made).rows
    wanted = [expected(made, name, row) for row in given]
    assert [(row["prompt_ids"], row["response_ids"]) for row in tokenized] == wanted

    batch = GroupCollator(made.pad_token_id, layout)(list(tokenized))
    labels = [label for label in batch["labels"].flatten().tolist() if label != IGNORE_INDEX]
    assert labels == [token for _, responses in wanted for response in responses for token in response]

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(made), initializer_range=0.2, max_position_embeddings=512, **sizes)).eval()
    with torch.no_grad():
        tokens = model_logps(model, **{"attention_mask": None, **model_inputs(model, batch)}, labels=batch["labels"])
        got = group_logps(tokens, batch)
        plain = copy.deepcopy(model).double()
        for b, (prompt, responses) in enumerate(wanted):
            for k, response in enumerate(responses):
                logps = plain(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                truth = logps.gather(1, torch.tensor(response)[:, None]).sum().item()
                assert got[b, k].item() == pytest.approx(truth, rel=1e-5)
