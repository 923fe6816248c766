"""Rank candidate answers by their likelihood, without generating text.

Shapes: B prompts, L their padded length, A candidates, T their padded length with `<eos>`, R rows of a forward pass, V
vocabulary.
"""

import torch
from torch import Tensor

from fused_ops import cast_lora, lora_layers
from modeling_vlm import BatchPlan, ImageFeatures, KVCache
from processing_paligemma import Processor

ROWS_AT_ONCE = 64  # pairs of prompt and candidate in one forward pass


@torch.no_grad()
def rank_candidates(
    model: torch.nn.Module,
    processor: Processor,
    batch: dict[str, Tensor],
    plan: BatchPlan,
    features: ImageFeatures | None,
    candidates: tuple[str, ...],
) -> list[tuple[str, float]]:
    """The best of `candidates` for each prompt, by the mean log-probability of its tokens and `<eos>`, and the
    confidence in it: its probability, given that the answer is one of the candidates.

    The mean is used because "-1" is shorter than a cell: a model that was not trained on these answers gives the
    shortest one the highest probability, whatever it sees. Its confidence in the best one is then low.

    `batch` holds prompts [B, L], padded on the left; `plan` is the plan of the batch, `features` are those of its
    images. One pass over the prompts fills the KV cache, and every candidate continues from it.
    """
    language = model.model.language_model
    count, length = batch["input_ids"].shape
    ids, is_token = candidate_tensors(processor, candidates, batch["input_ids"].device)
    mask, positions = plan.mask, model.model.positions(batch["attention_mask"])
    x = model.model.embed(batch["input_ids"], features, plan.image_tokens)
    cache = KVCache(language, count, length, x.dtype, x.device)
    prompts = torch.arange(count, device=x.device).repeat_interleave(len(ids))  # of all pairs of prompt and candidate
    with cast_lora(lora_layers(model)):
        first = model.head(language(x, positions, mask, cache, keep_last=1)[:, -1]).float().log_softmax(-1)  # [B, V]
        pairs = zip(prompts.split(ROWS_AT_ONCE), ids.repeat(count, 1).split(ROWS_AT_ONCE), strict=True)
        later = [continue_prompts(model, cache, batch["attention_mask"], *rows) for rows in pairs]
    later = torch.cat(later).unflatten(0, (count, -1))  # [B, A, T - 1]
    total = first[:, ids[:, 0]] + (later * is_token[:, 1:]).sum(-1)  # [B, A]
    chosen = (total / is_token.sum(1)).argmax(1, keepdim=True)
    confidence = total.softmax(1).gather(1, chosen)
    best = zip(chosen.flatten().tolist(), confidence.flatten().tolist(), strict=True)
    return [(candidates[index], value) for index, value in best]


def continue_prompts(model: torch.nn.Module, cache: KVCache, valid: Tensor, prompts: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [R, T - 1] of the second and later tokens of ids [R, T], each row after a cached prompt.

    `valid` [B, L] is the attention mask of the prompts, `prompts` [R] the prompt of each row.
    """
    language, (count, width), length = model.model.language_model, ids.shape, cache.length
    extended = KVCache(language, count, length + width, cache.keys[0].dtype, ids.device)
    for targets, sources in ((extended.keys, cache.keys), (extended.values, cache.values)):
        for target, source in zip(targets, sources, strict=True):
            target[:, :, :length] = source[prompts]
    extended.length = length
    valid = torch.cat((valid[prompts], torch.ones_like(ids)), dim=1)
    types = torch.zeros_like(valid)
    types[:, length:] = 1
    mask, positions = model.model.mask(valid, types), model.model.positions(valid)[:, length:]
    hidden = language(language.embed(ids), positions, mask, extended)
    return model.head(hidden[:, :-1]).float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def candidate_tensors(processor: Processor, candidates: tuple[str, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [A, T] of the candidates with `<eos>`, padded on the right, and a mask [A, T]: 1.0 at tokens."""
    rows = [processor.encode("", text, 0) for text in candidates]
    rows = [[i for i, is_answer in zip(*row, strict=True) if is_answer] for row in rows]
    width = max(map(len, rows))
    ids = torch.tensor([row + [processor.pad_token_id] * (width - len(row)) for row in rows], device=device)
    is_token = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows], device=device)
    return ids, is_token
