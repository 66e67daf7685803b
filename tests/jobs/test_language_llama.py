"""The GPT is the architecture it says it is: with the same weights it answers as transformers' Llama does."""

from __future__ import annotations

import warnings

import pytest
import torch

from jobs.language import GPT, Shape

NAMES = {
    "embedding": "model.embed_tokens",
    "blocks": "model.layers",
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
    "head": "lm_head",
}


def renamed(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module == "norm":
        return f"model.norm.{leaf}"
    for ours, theirs in NAMES.items():
        if module == ours or module.endswith(f".{ours}"):
            module = module.removesuffix(ours) + theirs
            break
    return f"{module.replace('blocks', 'model.layers')}.{leaf}"


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_it_answers_as_llama_does(kv_heads: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, at import
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = Shape(width=64, layers=3, heads=4, kv_heads=kv_heads)
    torch.manual_seed(0)
    model = GPT(shape).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # gains of 1 would hide a norm in the wrong place
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llama = transformers.LlamaForCausalLM(config).eval()
    llama.load_state_dict({renamed(name): value for name, value in model.state_dict().items()})
    tokens = torch.randint(0, 256, (3, 50))
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens), llama(tokens).logits, rtol=1e-5, atol=1e-5)
