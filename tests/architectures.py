"""Tiny random-weight models of many architectures, without any download."""

import warnings

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 99

# One dictionary for all: a configuration takes the names that it knows.
SIZES = {
    "vocab_size": VOCAB,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "emb_dim", "attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "dff", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 8,
    "rotary_dim": 4,
    "state_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}

_LATENT = {
    "head_dim": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}

# What a configuration needs besides; the logit scales and softcaps are odd, so that no default passes for them.
ARCHITECTURES = {
    "bert": {},
    "biogpt": {},
    "bloom": {},
    "codegen": {},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.07},
    "ctrl": {},
    "deepseek_v3": {**_LATENT, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4},
    "falcon": {"head_dim": None},
    "falcon_h1": {**_MAMBA, "lm_head_multiplier": 0.6},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 2.5},
    "gemma3_text": {"final_logit_softcapping": 4.0},
    "glm4": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_oss": {},
    "gptj": {},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 5.0},
    "granitemoe": {"logits_scaling": 0.7},
    "llama": {},
    "mamba": {},
    "minicpm3": {**_LATENT, "num_key_value_heads": 4, "scale_emb": 12, "dim_model_base": 8},
    "mistral": {},
    "mixtral": {},
    "mpt": {},
    "nanochat": {"final_logit_softcapping": 3.0},
    "nemotron": {},
    "olmo2": {},
    "openai-gpt": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {"tie_word_embeddings": True},
    "recurrent_gemma": {"logits_soft_cap": 2.0, "lru_width": 32, "block_types": ["recurrent", "attention"]},
    "roberta": {},
    "rwkv": {"context_length": 64},
    "stablelm": {},
    "starcoder2": {},
    "xglm": {},
    "xlm": {"causal": True},
}


def tiny(name, **overrides):
    """A model of the architecture, whose random weights are large enough for softcap, scale and bias to affect the log-probs."""
    config = AutoConfig.for_model(name)
    sizes = {key: value for key, value in SIZES.items() if hasattr(config, key)}
    wanted = {key: value for key, value in {**sizes, **ARCHITECTURES.get(name, {}), **overrides}.items() if value is not None}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(type(config)(**wanted))
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.normal_(std=0.5)
        if head.bias is not None:
            head.bias.normal_()
    return model.eval()


def batch(padded="right"):
    """input_ids, attention_mask and labels: two prompts of three tokens, one of the sequences shorter."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, VOCAB, (2, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    labels[:, :3] = -100
    gone = slice(6, None) if padded == "right" else slice(None, 2)
    input_ids[1, gone], attention_mask[1, gone], labels[1, gone] = 0, 0, -100
    return input_ids, attention_mask, labels
