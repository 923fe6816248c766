"""Tiny random PaliGemmas, ours and transformers', with the same weights: amplified, so that masks and caps show."""

import torch
import transformers

from modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration

IMAGE, PAD, EOS, BOS, NEWLINE = 90, 0, 1, 2, 3
PATCHES = 4  # image tokens per image


def hf_config(family: str, vision: dict | None = None, **text) -> transformers.PaliGemmaConfig:
    shared = dict(vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=3, head_dim=16)
    if family == "gemma":
        shared |= dict(num_attention_heads=4, num_key_value_heads=1)
    else:  # a window shorter than the sequence, caps within reach of amplified logits
        shared |= dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=5, query_pre_attn_scalar=24)
        shared |= dict(attn_logit_softcapping=5.0, final_logit_softcapping=8.0)
    text_class = transformers.GemmaConfig if family == "gemma" else transformers.Gemma2Config
    changes = vision or {}
    vision = dict(hidden_size=36, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3)
    vision |= dict(image_size=28, patch_size=14, vision_use_head=False)
    return transformers.PaliGemmaConfig(
        text_config=text_class(**shared | text),
        vision_config=transformers.SiglipVisionConfig(**vision | changes),
        image_token_index=IMAGE,
        projection_dim=48,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )


def hf_model(
    family: str, seed: int = 0, amplify: float = 6.0, **text
) -> transformers.PaliGemmaForConditionalGeneration:
    torch.manual_seed(seed)
    config = hf_config(family, **text)
    config._attn_implementation = "eager"
    model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
            elif p.ndim > 1:  # a tied embedding that outgrows its layers would only echo the last token
                p.mul_(amplify if "embed" in name else 2 * amplify)
            else:
                p.normal_(std=0.3)
    return model


def ours_like(hf) -> PaliGemmaForConditionalGeneration:
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_dict(hf.config.to_dict()))
    model.load_state_dict(hf.state_dict(), strict=True)
    return model.eval()


def pair(family: str, **kwargs):
    hf = hf_model(family, **kwargs)
    return hf, ours_like(hf)


def batch(prefixes=(5, 2), suffixes=(3, 4), images: int = 1, side: str = "right", seed: int = 0) -> dict:
    """Rows of uneven prefix and suffix lengths: input_ids, attention_mask, token_type_ids, labels, pixel_values."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prefix, suffix in zip(prefixes, suffixes, strict=True):
        words = torch.randint(4, IMAGE, (prefix + suffix,), generator=generator).tolist()
        rows.append(([IMAGE] * PATCHES * images + [BOS] + words[:prefix] + [NEWLINE], words[prefix:]))
    length = max(len(p) + len(s) for p, s in rows)
    out = {key: [] for key in ("input_ids", "attention_mask", "token_type_ids", "labels")}
    for p, s in rows:
        pad = length - len(p) - len(s)
        left, right = (pad, 0) if side == "left" else (0, pad)
        out["input_ids"].append([PAD] * left + p + s + [PAD] * right)
        out["attention_mask"].append([0] * left + [1] * len(p + s) + [0] * right)
        out["token_type_ids"].append([0] * (left + len(p)) + [1] * len(s) + [0] * right)
        out["labels"].append([-100] * (left + len(p)) + s + [-100] * right)
    out = {key: torch.tensor(value) for key, value in out.items()}
    out["pixel_values"] = torch.rand(len(rows) * images, 3, 28, 28, generator=generator) * 2 - 1
    return out


def quick(config_class, model, folder, **changes):
    """A fine-tuning run of seconds: a Config of either script, its run in `folder`/run, logged at every step."""
    made = dict(batch_size=4, eval_samples=4, eval_batch_size=4, max_new_tokens=3, log_every=1, save_every=2)
    return config_class(model=str(model), output_dir=str(folder / "run"), **made | changes)


def prompts(**kwargs) -> dict:
    """A left-padded batch without suffixes, as `generate` takes it."""
    made = batch(suffixes=(0,) * len(kwargs.get("prefixes", (5, 2))), side="left", **kwargs)
    return {key: made[key] for key in ("input_ids", "attention_mask", "token_type_ids", "pixel_values")}
