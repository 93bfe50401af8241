"""Causal language models of transformers' architectures, small enough to be made in a test, with random weights."""

from __future__ import annotations

import torch

WINDOW = 8
SMALL = {
    "vocab_size": 97, "hidden_size": 32, "d_model": 32, "n_embd": 32, "n_embed": 32, "dim": 32, "emb_dim": 32,
    "word_embed_proj_dim": 32, "embedding_size": 32, "intermediate_size": 48, "ffn_dim": 48, "dff": 48, "d_inner": 64,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "ffn_hidden_size": 48, "feed_forward_size": 48,
    "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4,
    "decoder_layers": 2, "encoder_layers": 2, "num_attention_heads": 2, "n_head": 2, "n_heads": 2, "num_heads": 2,
    "decoder_attention_heads": 2, "encoder_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "attention_head_dim": 16, "global_head_dim": 16, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64,
    "context_length": 64, "sliding_window": WINDOW, "sliding_window_size": WINDOW, "attention_chunk_size": WINDOW,
    "attention_window_size": WINDOW, "window_size": WINDOW, "local_attention": WINDOW, "max_seq_len": 64,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "moe_num_experts": 4, "moe_k": 2, "num_experts_per_token": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2,
    "mamba_d_ssm": 64, "mamba_chunk_size": 8, "mamba_n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "state_size": 8, "ssm_state_size": 8,
    "time_step_rank": 4, "chunk_size": 8, "linear_num_value_heads": 2, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "lru_width": 32, "num_blocks": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0, "attention_hidden_size": 32, "first_k_dense_replace": 1, "use_sliding_window": True,
    "max_window_layers": 1, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 16, "block_size": 8,
}  # fmt: skip


_KINDS = """
afmoe apertus arcee aria_text bailing_hybrid bamba bart beam bigbird_pegasus biogpt bitnet blenderbot
blenderbot-small bloom cohere cohere2 cohere2_moe ctrl cwm doge dory dots1 ernie4_5 ernie4_5_moe exaone4
exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma gemma2 gemma3_text gemma3n_text gemma4_text glm
glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss granite granite_swa granitemoe
granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4
hyperclovax jais2 jamba jetmoe kolibri1 laguna lara_mini lfm2 lfm3 llama llama4_text mamba marian mbart mellum
mimo_v2_flash minimax minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder moshi mpt mvp
nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt pegasus persimmon phi phi3 phimoe plbart
prophetnet qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next recurrent_gemma rwkv
sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 trocr vaultgemma whisper xglm xlstm
"""
KINDS = tuple(_KINDS.split())
"""What can be made from `SMALL`."""


def tiny(kind: str, **more):
    """A model of ``kind`` (a ``model_type`` of transformers) in fp32, all matrices drawn so widely that attention
    shows in the logits; windows and chunks of `WINDOW` tokens."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[kind]
    known = {*cls().to_dict(), *cls.attribute_map}
    shape = {name: value for name, value in SMALL.items() if name in known} | more
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(cls(**shape))
    for p in net.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    return net.eval()
