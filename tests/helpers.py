"""What tests of several folders use: inputs of mechanisms, counts of their work, words and models of small runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from approx_attn.attention import AttentionMask, AttentionMechanism
from approx_attn.attention.base import Cost
from approx_attn.attention.exact import ExactAttention

ROOT = Path(__file__).resolve().parents[1]

# Words of a configuration: a run that says nothing, and a model that is trained in a second.
QUIET = ("progress_bar=false", "logger=csv", "trainer.accelerator=cpu")
SMALL_MODEL = ("model.dim=16", "model.num_heads=2", "model.feed_forward_dim=16", "model.depth=1")
TINY = ("debug=fast", *QUIET, *SMALL_MODEL)


# -- mechanisms -----------------------------------------------------------------------------------------


class MechanismPath(AttentionMechanism):
    """Exact attention that is not the class layer and function hand to PyTorch, and keeps the mask it was given."""

    name = "mechanism_path"
    capabilities = ExactAttention.capabilities

    def attend(self, query, key, value, request):
        self.seen = request.mask
        return ExactAttention.attend(self, query, key, value, request)

    def cost(self, query_length, key_length=None, *, causal=None):
        return Cost(0, 0, 0, 0, 0)


def draw(
    n_q: int,
    n_k: int | None = None,
    dim: int = 4,
    *,
    batch: int = 2,
    heads: int = 2,
    key_heads: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Queries, keys and values (b, h, n, d), the same numbers at every call and in every dtype."""
    n_k, key_heads = n_q if n_k is None else n_k, key_heads or heads
    generator = torch.Generator().manual_seed(n_q + 100 * n_k)
    shapes = ((batch, heads, n_q, dim), *2 * ((batch, key_heads, n_k, dim),))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def clear_padding(tensors: Sequence[Tensor], mask: AttentionMask) -> tuple[Tensor, ...]:
    """Queries, and keys and values with zeros where the mask says that they are padding."""
    if mask.key_keep is None:
        return tuple(tensors)
    query, *others = tensors
    return query, *(x.masked_fill(~mask.key_keep[:, None, :, None], 0.0) for x in others)


def naive_cap(scores: Tensor, mask: AttentionMask) -> Tensor:
    """Scaled scores of any shape, soft-capped where the mask says so."""
    return scores if mask.softcap is None else mask.softcap * torch.tanh(scores / mask.softcap)


def naive_softmax(scores: Tensor, mask: AttentionMask, head: int | None = None) -> Tensor:
    """exp(s) / (Σ exp(s) + exp(sink)) of rows (b, h, n_q, n_k), or of rows of one head, with the sinks of the mask."""
    if mask.sinks is None:
        return scores.softmax(-1)
    sink = mask.sinks.to(scores.dtype)
    sink = sink[None, :, None, None] if head is None else sink[head]
    column = sink.expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]


def naive_reference(name: str) -> ModuleType:
    """The module tests/attention/naive/<name>.py."""
    path = ROOT / "tests" / "attention" / "naive" / f"{name}.py"
    assert path.exists(), f"{name} needs {path.relative_to(ROOT)}; see tests/attention/test_contract.py"
    spec = importlib.util.spec_from_file_location(f"naive_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def multiply_adds(run: Callable[..., object], *arguments: object) -> float:
    """Multiply-adds of the products of matrices in a call, as PyTorch counts them."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels are not counted
        run(*arguments)
    return counter.get_total_flops() / 2


def assert_cost_is_performed(
    mechanism: AttentionMechanism, tensors: Sequence[Tensor], mask: AttentionMask | None = None, uncounted: int = 0
) -> None:
    """The cost record of one sample states the products that are made, and so many operations that are none."""
    mask = mask or AttentionMask()
    cost = mechanism.cost(tensors[0].shape[2], tensors[1].shape[2], causal=mask.causal)
    one = [x[:1].detach() for x in tensors]
    assert multiply_adds(mechanism, *one, mask) == cost.multiply_adds - uncounted


def held_sizes(run: Callable[..., object], *arguments: object) -> list[int]:
    """Numbers of elements of the tensors that a forward pass holds for its backward pass."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        run(*arguments)
    return sizes


# -- tiny models of transformers --------------------------------------------------------------------------

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def save_tiny_bert(folder: Path, words: Sequence[str], *, seed: int = 0, **settings: object) -> Path:
    """A folder with a random BERT and a tokenizer that knows these words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL_TOKENS, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        **{**shape, "vocab_size": len(vocabulary), "max_position_embeddings": 32, **settings}
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder
