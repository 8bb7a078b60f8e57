"""Time to the first token, and from token to token, of a converted causal model beside the exact one.

Weights are random, so only times mean something: a model of this shape takes as long with any weights.
"""

import argparse

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import approx_attn
from approx_attn.run.measurement import time_alternately

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--length", type=int, default=8192, help="tokens of the prompt")
parser.add_argument("--layers", type=int, default=12)
parser.add_argument("--width", type=int, default=768, help="in heads of 64")
parser.add_argument("--keep", type=int, default=224, help="exact keys per query")
parser.add_argument("--tokens", type=int, default=16, help="tokens after the first")
parser.add_argument("--rounds", type=int, default=3, help="both models take turns in each")
options = parser.parse_args()

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32000,
    hidden_size=options.width,
    intermediate_size=options.width * 8 // 3,
    num_hidden_layers=options.layers,
    num_attention_heads=options.width // 64,
    max_position_embeddings=options.length + options.tokens + 1,
)
exact = LlamaForCausalLM(config).eval()
converted = LlamaForCausalLM(config).eval()
converted.load_state_dict(exact.state_dict())
approx_attn.convert(converted, attention="eigen_cluster", keep=options.keep, calibration=None)
models = {"exact": exact, "converted": converted}
prompt = torch.randint(3, config.vocab_size, (1, options.length))
caches = {}


@torch.no_grad()
def first_token(name: str) -> None:
    caches[name] = DynamicCache(config=config)
    models[name](prompt, past_key_values=caches[name], logits_to_keep=1)


@torch.no_grad()
def further_tokens(name: str) -> None:
    for _ in range(options.tokens):
        models[name](prompt[:, -1:], past_key_values=caches[name])
    caches[name].crop(-options.tokens)


def timed(function, warm_up: int) -> dict[str, float]:
    calls = {name: lambda name=name: function(name) for name in models}
    return {name: timing.median for name, timing in time_alternately(calls, options.rounds, warm_up).items()}


firsts, steps = timed(first_token, warm_up=0), timed(further_tokens, warm_up=1)
print(f"{options.length} tokens: seconds to the first token, milliseconds to each of the next {options.tokens}")
for name in models:
    print(f"{name:9} {firsts[name]:8.2f} {steps[name] / options.tokens * 1e3:8.1f}")
