"""A small Llama trained on the sources of Python's standard library, for :mod:`bench.skip`.

``python -m bench.skip_model FOLDER`` trains it and saves it with its tokenizer and its held-out text, for the options of
``python -m bench skip``. With ``--skip-mass`` it shows what leaving out slices does to a training.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nca_kernels.integrations.models.heads import model_logps

VOCAB, WIDTH, LAYERS = 16384, 256, 4
STEPS, BATCH, LENGTH = 200, 16, 256
LEARNING_RATE = 2e-3


def sources() -> tuple[list[Path], list[Path]]:
    """The files of the standard library, in the order of their names: those of the training, and every 20th held out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in folder.rglob("*.py") if not {"site-packages", "lib2to3"} & set(file.parts))
    return [file for i, file in enumerate(files) if i % 20], files[::20]


def texts(files: list[Path]) -> Iterator[str]:
    for file in files:
        yield file.read_text("utf-8", errors="replace")


def trained() -> tuple[LlamaForCausalLM, Tensor]:
    """The model after its training, and the token ids of the held-out files in a row."""
    model, tokenizer = _train()
    return model, _ids(tokenizer, sources()[1])


@torch.enable_grad()
def _train(skip_mass: float = 0.0, seed: int = 0) -> tuple[LlamaForCausalLM, ByteLevelBPETokenizer]:
    files, _ = sources()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts(files), vocab_size=VOCAB, show_progress=False)
    ids = _ids(tokenizer, files)
    ids = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for step, chosen in enumerate(torch.randint(len(ids), (STEPS, BATCH))):
        batch = ids[chosen]
        loss = -model_logps(model, batch, None, batch, skip_mass=skip_mass).sum() / (BATCH * (LENGTH - 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step}: {loss.item():.2f} nats a token", flush=True)
    return model, tokenizer


def _ids(tokenizer: ByteLevelBPETokenizer, files: list[Path]) -> Tensor:
    return torch.tensor([token for encoding in tokenizer.encode_batch(list(texts(files))) for token in encoding.ids])


@torch.no_grad()
def _held_out_loss(model: LlamaForCausalLM, ids: Tensor) -> float:
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[:256]
    logps = torch.cat([model_logps(model, batch, None, batch) for batch in rows.split(BATCH)])
    return -(logps.sum() / logps[:, 1:].numel()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--skip-mass", type=float, default=0.0, help="of the training's gradients (default: 0, exact)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the batches (default: 0)")
    options = parser.parse_args()
    folder = options.folder
    model, tokenizer = _train(options.skip_mass, options.seed)
    print(f"held out: {_held_out_loss(model, _ids(tokenizer, sources()[1])):.4f} nats a token")
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(folder)
    (folder / "held-out.txt").write_text("".join(texts(sources()[1])), encoding="utf-8")


if __name__ == "__main__":
    main()
