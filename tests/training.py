"""Rows, models and runs for the trainer's tests."""

import random

import torch
import torch.nn.functional as F
from architectures import VOCAB, tiny

from nca_kernels.integrations.data.collator import GroupCollator, group_logps
from nca_kernels.integrations.models.heads import model_logps
from nca_kernels.integrations.training.config import NCAConfig
from nca_kernels.integrations.training.plots import PlotsCallback
from nca_kernels.integrations.training.trainer import NCATrainer

# The keywords of a BitsAndBytesConfig: QLoRA's base in 4 bits, float32 between its layers.
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"}


def make_rows(n, *, ragged=True, seed=0):
    """Tokenized rows of random lengths; ``ragged`` gives 2 to 5 responses, otherwise there are 3."""
    draw = random.Random(seed)

    def ids(low, high):
        return [draw.randrange(3, VOCAB) for _ in range(draw.randint(low, high))]

    rows = []
    for _ in range(n):
        K = draw.randint(2, 5) if ragged else 3
        scores = [round(draw.random(), 2) for _ in range(K)]
        rows.append({"prompt_ids": ids(2, 6), "response_ids": [ids(1, 7) for _ in range(K)], "scores": scores})
    return rows


@torch.no_grad()
def with_ref_logps(rows, model):
    batch = GroupCollator(0)(rows)
    logps = group_logps(model_logps(model, batch["input_ids"], batch["attention_mask"], batch["labels"]), batch)
    return [{**row, "ref_logps": values[mask].tolist()} for row, values, mask in zip(rows, logps, batch["mask"], strict=True)]


def plain_logps(model, prompt, responses):
    """The log-prob of each response, from the model's own logits in float64."""
    longest = max(map(len, responses))
    ids = torch.tensor([prompt + response + [0] * (longest - len(response)) for response in responses])
    scored = torch.arange(longest) < torch.tensor([len(response) for response in responses])[:, None]
    logits = model(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 : -1].double()
    logps = F.log_softmax(logits, -1).gather(2, ids[:, len(prompt) :, None])[..., 0]
    return (logps * scored).sum(1)


def config(folder, **options):
    """The configuration of a quiet run on the CPU, with SGD, because Adam would amplify rounding in gradients near 0."""
    defaults = {
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": 0.2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "logging_steps": 1,
        **({"kto_threshold": 0.5} if options.get("loss") == "kto" else {}),
    }
    return NCAConfig(output_dir=str(folder), **{**defaults, **options})


def trained(folder, rows, model=None, eval_dataset=None, resume=None, evaluated=False, **options):
    """The trainer after its run, which resumes from ``resume`` if given and is ``evaluated`` before; other keywords go to the
    config or the trainer.
    """
    names = ("processing_class", "peft_config", "ref_model", "callbacks")
    keywords = {name: options.pop(name) for name in names if name in options}
    trainer = NCATrainer(model or tiny("llama"), config(folder, **options), rows, eval_dataset, **keywords)
    trainer.remove_callback(PlotsCallback)  # a second each
    if evaluated:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same_weights(ours, wanted, start=None, rtol=1e-4):
    """Equal up to ``rtol`` of a tensor's largest change from ``start``, plus its rounding; without ``start``, bit for bit."""
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if start is None:
            assert torch.equal(ours[name], tensor), name
        else:
            change = (tensor - start[name]).abs().max()
            rounding = 4 * torch.finfo(tensor.dtype).eps * tensor.abs().max()
            assert (ours[name] - tensor).abs().max() <= rtol * change + rounding, name


def logged(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]
