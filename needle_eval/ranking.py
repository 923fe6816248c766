"""Rank candidate answers by their likelihood, without generating text.

Shapes: B prompts, L their padded length, A candidates, T their padded length with `<eos>`, V vocabulary, N tokens per
image, C hidden size.
"""

import torch
from torch import Tensor

from fused_ops import cast_lora, lora_layers
from modeling_vlm import BatchPlan, ImageFeatures, KVCache
from processing_paligemma import Processor

CANDIDATES_AT_ONCE = 64  # rows of one forward pass


@torch.no_grad()
def rank_candidates(
    model: torch.nn.Module,
    processor: Processor,
    batch: dict[str, Tensor],
    plan: BatchPlan,
    features: ImageFeatures | None,
    candidates: tuple[str, ...],
) -> list[tuple[str, float]]:
    """The most likely of `candidates` for each prompt, by the mean log-probability of its tokens and `<eos>`, and the
    confidence in it: its probability, given that the answer is one of the candidates.

    `batch` holds prompts [B, L], padded on the left; `plan` is the plan of the batch, `features` are those of its
    images. The mean is used because "-1" is shorter than a cell and a sum would favour it. One pass over the prompts
    fills the KV cache, and every candidate continues from it.
    """
    language = model.model.language_model
    count, length = batch["input_ids"].shape
    ids, is_token = candidate_tensors(processor, candidates, batch["input_ids"].device)
    mask, positions = plan.mask, model.model.positions(batch["attention_mask"])
    x = model.model.embed(batch["input_ids"], features, plan.image_tokens)
    cache = KVCache(language, count, length, x.dtype, x.device)
    best = []
    with cast_lora(lora_layers(model)):
        first = model.head(language(x, positions, mask, cache, keep_last=1)[:, -1]).float().log_softmax(-1)  # [B, V]
        for row in range(count):
            valid, parts = batch["attention_mask"][row], ids.split(CANDIDATES_AT_ONCE)
            later = torch.cat([continue_prompt(model, cache, valid, row, part) for part in parts])
            total = first[row][ids[:, 0]] + (later * is_token[:, 1:]).sum(1)  # [A]
            chosen = int((total / is_token.sum(1)).argmax())
            best.append((candidates[chosen], float(total.softmax(0)[chosen])))
    return best


def continue_prompt(model: torch.nn.Module, cache: KVCache, valid: Tensor, row: int, ids: Tensor) -> Tensor:
    """Log-probabilities [A, T - 1] of the second and later tokens of ids [A, T], after the cached prompt of `row`.

    `valid` [L] is the attention mask of that prompt.
    """
    language, (count, width), length = model.model.language_model, ids.shape, cache.length
    wide = KVCache(language, count, length + width, cache.keys[0].dtype, ids.device)
    for ours, prompts in ((wide.keys, cache.keys), (wide.values, cache.values)):
        for new, old in zip(ours, prompts, strict=True):
            new[:, :, :length] = old[row]
    wide.length = length
    valid = torch.cat((valid.expand(count, -1), torch.ones_like(ids)), dim=1)
    types = torch.zeros_like(valid)
    types[:, length:] = 1
    mask, positions = model.model.mask(valid, types), model.model.positions(valid)[:, length:]
    hidden = language(language.embed(ids), positions, mask, wide)
    return model.head(hidden[:, :-1]).float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def candidate_tensors(processor: Processor, candidates: tuple[str, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [A, T] of the candidates with `<eos>`, padded on the right, and a mask [A, T]: 1.0 at tokens."""
    rows = [processor.encode("", text, 0) for text in candidates]
    rows = [[i for i, is_answer in zip(*row, strict=True) if is_answer] for row in rows]
    width = max(map(len, rows))
    ids = torch.tensor([row + [processor.pad_token_id] * (width - len(row)) for row in rows], device=device)
    is_token = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows], device=device)
    return ids, is_token
