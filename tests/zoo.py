"""Tiny models of every causal language model architecture of the installed transformers"""

import functools
import os

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# values by the names under which configurations know them
tiny = dict(
    vocab_size=96,
    hidden_size=32,
    n_embd=32,
    d_model=32,
    dim=32,
    embedding_size=32,
    intermediate_size=48,
    n_inner=48,
    d_ff=48,
    ffn_dim=48,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    num_hidden_layers=2,
    n_layer=2,
    n_layers=2,
    num_layers=2,
    encoder_layers=2,
    decoder_layers=2,
    num_attention_heads=4,
    n_head=4,
    n_heads=4,
    num_heads=4,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    n_positions=64,
    n_ctx=64,
    max_sequence_length=64,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    first_k_dense_replace=1,
    sliding_window=8,
    state_size=8,
    time_step_rank=4,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
dozen = (
    "llama qwen3 gpt_neox gpt2 mistral gemma2 gemma3_text falcon phi3 granite mamba qwen3_moe"
).split()
everything = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
chosen = everything if os.environ.get("LLMPAPERS_SWEEP") == "all" else dozen


def config_of(kind, **more):
    "A tiny configuration; ValueError with the reason if there is none"
    try:
        cls = type(transformers.AutoConfig.for_model(kind))
        known = set(cls().to_dict())
        config = cls(**{k: v for k, v in (tiny | more).items() if k in known})
    except Exception as e:
        raise ValueError(f"no tiny configuration: {type(e).__name__}: {str(e)[:80]}") from e
    return config


# other sizes to try where those above do not fit together
others = [{}, dict(num_key_value_heads=4), dict(head_dim=None), dict(num_key_value_heads=1)]


@functools.cache
def model_of(kind):
    "A model in evaluation mode whose random weights are large enough to matter; or ValueError"
    why = None
    for more in others:
        try:
            return _model_of(config_of(kind, **more))
        except ValueError as e:
            why = why or e
    raise why


def _model_of(config):
    try:
        with torch.device("meta"):
            size = sum(
                p.numel()
                for p in transformers.AutoModelForCausalLM.from_config(config).parameters()
            )
    except Exception as e:
        raise ValueError(f"does not build: {type(e).__name__}: {str(e)[:80]}") from e
    if size > 3_000_000:
        raise ValueError(f"not tiny: {size:,} parameters")
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model = model.eval()
        ids = torch.arange(3, 15)[None]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    except Exception as e:
        raise ValueError(f"no plain pass: {type(e).__name__}: {str(e)[:80]}") from e
    if logits.shape[:2] != ids.shape or not logits.isfinite().all():
        raise ValueError(f"no causal logits: shape {tuple(logits.shape)}")
    with torch.no_grad():
        other = model(input_ids=torch.cat([ids[:, :6], ids[:, :6]], 1), use_cache=False).logits
    if (other[:, :6] - logits[:, :6]).abs().max() > 1e-4:
        raise ValueError("not causal: what comes later changes what was before")
    return model
