"""The names that keys of TRL, LLaMA-Factory and the authors' scripts have here."""

from __future__ import annotations

_LORA = "lora: {{{}: ...}}"
_INIT = "model_init_kwargs: {{{}: ...}}"

# Names of TRL's and transformers' scripts, of LLaMA-Factory's YAML, and of the authors' fork of the alignment handbook.
OTHER_NAMES = {
    **dict.fromkeys(("model_name_or_path", "model_name", "base_model", "model_path"), "model"),
    **dict.fromkeys(("dataset_name", "dataset", "dataset_path", "dataset_mixer", "train_file", "train_data", "data_path"), "data"),
    **dict.fromkeys(("eval_dataset", "eval_file", "validation_file"), "eval_data"),
    **dict.fromkeys(("dataset_train_split", "train_split"), "split"),
    **dict.fromkeys(("dataset_test_split", "test_split"), "eval_split"),
    **dict.fromkeys(("dataset_config", "dataset_config_name"), "config_name"),
    **dict.fromkeys(("loss_type", "pref_loss"), "loss"),
    **dict.fromkeys(("pref_beta", "dpo_beta"), "beta"),
    **dict.fromkeys(("cutoff_len", "max_seq_length", "max_seq_len", "max_completion_length"), "max_length"),
    **dict.fromkeys(("reward_temperature", "tau"), "alpha"),
    **dict.fromkeys(("num_generations", "K"), "num_responses"),
    **dict.fromkeys(("rpo_alpha", "pref_ftx", "sft_weight"), "nll_weight"),
    **dict.fromkeys(("precompute_ref_log_probs", "precompute_ref_logps"), "reference: precompute"),
    **dict.fromkeys(("tokenizer_name_or_path", "tokenizer_name"), "tokenizer"),
    **dict.fromkeys(("use_peft", "use_lora", "finetuning_type"), "lora: {r: ..., target_modules: ...}"),
    **dict.fromkeys(("lora_r", "lora_rank"), _LORA.format("r")),
    "lora_alpha": _LORA.format("lora_alpha"),
    "lora_dropout": _LORA.format("lora_dropout"),
    **dict.fromkeys(("lora_target_modules", "lora_target"), _LORA.format("target_modules")),
    **dict.fromkeys(("lora_modules_to_save", "additional_target"), _LORA.format("modules_to_save")),
    "use_rslora": _LORA.format("use_rslora"),
    "use_dora": _LORA.format("use_dora"),
    **dict.fromkeys(("torch_dtype", "dtype"), _INIT.format("dtype")),
    **dict.fromkeys(("attn_implementation", "flash_attn", "use_flash_attention_2"), _INIT.format("attn_implementation")),
    **dict.fromkeys(("model_revision", "revision"), _INIT.format("revision")),
    "trust_remote_code": _INIT.format("trust_remote_code"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_bit"), _INIT.format("quantization_config")),
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps, which takes a share of all steps below 1",
    "template": "the tokenizer's own chat template",
    "chat_template": "the tokenizer's own chat template",
}
