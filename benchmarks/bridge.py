"""Measure which preset works in which model of transformers, on tiny random models, and write the table of
docs/bridge.md.

    python benchmarks/bridge.py

Everything runs in float32, with eager attention and SDPA where the model has both. E: the outputs at step 0 are
bit-equal to those of the standard model. C: greedy decoding gives the same logits with and without a KV cache, and for
a row padded on the left and for the row alone. T: together with LoRA, every trainable parameter gets a gradient within
four updates. S: the model loaded from the folder that `save_pretrained` writes gives the same outputs.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import transformers as hf
import tyro
from peft import LoraConfig, get_peft_model
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from differential_attention import PRESETS, DifferentialConfig, set_progress  # noqa: E402
from differential_transformers import add_differential, differential_parameters, from_pretrained  # noqa: E402
from errors import UserError  # noqa: E402

IMAGE, SIDE, PATCHES = 90, 16, 4  # id of an image token, pixels per side, image tokens per image
ROWS = (9, 5)  # text tokens of the two prompts; the second is padded on the left
NEW_TOKENS, UPDATES = 4, 4
TOLERANCE = 2e-5  # of logits, whose standard deviation is about 1
AMPLIFY = 6.0  # factor on the initial weights, so that maps are not uniform

TEXT = dict(
    vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, pad_token_id=0, eos_token_id=1, bos_token_id=2, max_position_embeddings=256,
)  # fmt: skip
TOWER = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8
)
WINDOW = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])
MROPE = dict(rope_type="default", rope_theta=10_000.0, mrope_section=[2, 3, 3])
QWEN_TOWER = dict(
    depth=1,
    hidden_size=32,
    num_heads=2,
    intermediate_size=32,
    out_hidden_size=64,
    patch_size=8,
    fullatt_block_indexes=[0],
)
QWEN3_TOWER = dict(
    depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=64, patch_size=8,
    deepstack_visual_indexes=[0], num_position_embeddings=16,
)  # fmt: skip


def longrope(frequencies: int, **changes) -> dict:
    factors = dict(
        short_factor=[1 + 0.05 * i for i in range(frequencies)], long_factor=[1.2 + 1.5 * i for i in range(frequencies)]
    )
    return dict(rope_type="longrope", rope_theta=10_000.0, original_max_position_embeddings=128, **factors, **changes)


class Host(NamedTuple):
    """A model of transformers."""

    make: Callable[[], hf.PreTrainedConfig]
    auto: type  # the class whose from_config builds it
    tower: str = "text"
    images: int = 0  # image tokens in front of each prompt
    implementations: tuple[str, ...] = ("eager", "sdpa")


def paligemma(text: hf.PreTrainedConfig) -> hf.PaliGemmaConfig:
    tower = hf.SiglipVisionConfig(**TOWER, vision_use_head=False)
    return hf.PaliGemmaConfig(text_config=text, vision_config=tower, image_token_index=IMAGE, projection_dim=64)


def gemma3(**changes) -> hf.Gemma3TextConfig:
    return hf.Gemma3TextConfig(**TEXT | WINDOW | dict(query_pre_attn_scalar=24) | changes)


def gemma3_images() -> hf.Gemma3Config:
    tower = hf.SiglipVisionConfig(**TOWER, vision_use_head=False)
    return hf.Gemma3Config(
        text_config=gemma3(), vision_config=tower, mm_tokens_per_image=PATCHES, image_token_index=IMAGE
    )


def phi4() -> hf.Phi4MultimodalConfig:
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    tower = hf.Phi4MultimodalVisionConfig(**TOWER | dict(image_size=28, patch_size=14))
    audio = hf.Phi4MultimodalAudioConfig(
        hidden_size=16, intermediate_size=16, num_blocks=1, num_attention_heads=2, ext_pw_out_channel=16,
        nemo_conv_channels=16, input_size=16, depthwise_separable_out_channel=16,
    )  # fmt: skip
    rope = longrope(6, partial_rotary_factor=0.75)
    return hf.Phi4MultimodalConfig(
        **text, vision_config=tower, audio_config=audio, rope_parameters=rope, original_max_position_embeddings=128
    )


def smolvlm() -> hf.SmolVLMConfig:
    return hf.SmolVLMConfig(
        text_config=hf.LlamaConfig(**TEXT), vision_config=hf.SmolVLMVisionConfig(**TOWER), image_token_id=IMAGE,
        scale_factor=2, pad_token_id=0,
    )  # fmt: skip


LM, VLM = hf.AutoModelForCausalLM, hf.AutoModelForImageTextToText
HOSTS = {
    "Llama": Host(lambda: hf.LlamaConfig(**TEXT), LM),
    "Mistral": Host(lambda: hf.MistralConfig(**TEXT, sliding_window=4), LM),
    "Qwen2": Host(lambda: hf.Qwen2Config(**TEXT), LM),
    "Qwen3": Host(lambda: hf.Qwen3Config(**TEXT), LM),
    "Qwen2.5-VL": Host(
        lambda: hf.Qwen2_5_VLConfig(
            text_config=hf.Qwen2_5_VLTextConfig(**TEXT, rope_parameters=MROPE).to_dict(),
            vision_config=QWEN_TOWER,
        ),
        VLM,
    ),
    "Qwen3-VL": Host(
        lambda: hf.Qwen3VLConfig(
            text_config=hf.Qwen3VLTextConfig(**TEXT, rope_parameters=MROPE).to_dict(), vision_config=QWEN3_TOWER
        ),
        VLM,
    ),
    "Phi3": Host(lambda: hf.Phi3Config(**TEXT, rope_parameters=longrope(8), original_max_position_embeddings=128), LM),
    "Phi4Multimodal": Host(phi4, LM, implementations=("eager",)),
    "Gemma 3, text": Host(gemma3, LM),
    "Gemma 3": Host(gemma3_images, VLM, images=PATCHES),
    "PaliGemma": Host(lambda: paligemma(hf.GemmaConfig(**TEXT | dict(num_key_value_heads=1))), VLM, images=PATCHES),
    "PaliGemma 2": Host(
        lambda: paligemma(
            hf.Gemma2Config(**TEXT | WINDOW | dict(query_pre_attn_scalar=24, attn_logit_softcapping=5.0))
        ),
        VLM,
        images=PATCHES,
        implementations=("eager",),
    ),
    "SmolVLM": Host(smolvlm, VLM, images=1),
    "SigLIP tower": Host(lambda: paligemma(hf.GemmaConfig(**TEXT)), VLM, tower="vision", images=PATCHES),
    "CLIP tower": Host(lambda: hf.CLIPVisionConfig(**TOWER), hf.CLIPVisionModel, tower="vision"),
    "SmolVLM tower": Host(smolvlm, VLM, tower="vision", images=1),
}


# ---- models and inputs
def make_model(host: Host, implementation: str = "eager") -> hf.PreTrainedModel:
    """A model with random, amplified weights, in eval mode."""
    torch.manual_seed(0)
    make = getattr(host.auto, "from_config", None) or host.auto._from_config
    model = make(host.make(), attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.any():
                parameter.mul_(AMPLIFY)
            else:  # Gemma 3's projector starts at zero
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_batch(host: Host, rows: tuple[int, ...] = ROWS, only: int | None = None) -> dict[str, Tensor]:
    """Inputs: prompts of these lengths, padded on the left, each with an image if the model takes images; with `only`
    just that prompt, without padding."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(len(rows), 3, SIDE, SIDE, generator=generator)
    words = [torch.randint(3, IMAGE, (count,), generator=generator) for count in rows]
    chosen = range(len(rows)) if only is None else [only]
    if isinstance(host.make(), hf.CLIPVisionConfig):
        return {"pixel_values": pixels[list(chosen)]}
    length = host.images + max(rows[i] for i in chosen)
    ids, mask = torch.zeros(len(chosen), length, dtype=torch.long), torch.zeros(len(chosen), length, dtype=torch.long)
    for row, i in enumerate(chosen):
        prompt = torch.cat((torch.full((host.images,), IMAGE), words[i]))
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if host.images:
        pixels = pixels[list(chosen)]
        is_smolvlm = isinstance(host.make(), hf.SmolVLMConfig)
        batch["pixel_values"] = pixels[:, None] if is_smolvlm else pixels
    if isinstance(host.make(), hf.PaliGemmaConfig | hf.Gemma3Config):
        batch["token_type_ids"] = (ids == IMAGE).long() if isinstance(host.make(), hf.Gemma3Config) else 0 * ids
    return batch


def run(model: hf.PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Logits, or the last hidden state if the model is only a tower."""
    out = model(**batch)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def stir(model: hf.PreTrainedModel, scale: float = 0.2) -> hf.PreTrainedModel:
    """Move every differential parameter away from its initial value."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in differential_parameters(model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
    set_progress(model, 0.7)
    return model


def config_of(host: Host, preset: str) -> DifferentialConfig:
    return DifferentialConfig(preset, towers=(host.tower,))


# ---- claims
def is_exact(host: Host, preset: str, implementation: str) -> bool:
    """Whether the outputs at step 0 are bit-equal to the standard model's."""
    model, batch = make_model(host, implementation), make_batch(host)
    with torch.no_grad():
        standard = run(model, batch)
        add_differential(model, config_of(host, preset))
        return torch.equal(run(model, batch), standard)


def is_cached(host: Host, preset: str, implementation: str) -> bool:
    """Whether decoding without a cache, and of single rows, gives the logits of cached decoding of the padded batch."""
    model = make_model(host, implementation)
    add_differential(model, config_of(host, preset))
    stir(model)
    options = dict(max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True)
    model.generation_config.eos_token_id = None

    def decode(batch: dict[str, Tensor], use_cache: bool) -> Tensor:
        with torch.no_grad():
            return torch.stack(model.generate(**batch, use_cache=use_cache, **options).logits)

    cached = decode(make_batch(host), True)
    found = {"uncached": decode(make_batch(host), False)}
    found["alone"] = torch.cat([decode(make_batch(host, only=i), True) for i in range(len(ROWS))], dim=1)
    return all((other - cached).abs().max() < TOLERANCE for other in found.values())


def is_trained(host: Host, preset: str, implementation: str) -> bool:
    """Whether every trainable parameter, of LoRA and of differential attention, gets a gradient."""
    base, batch = make_model(host, implementation), make_batch(host)
    fused = any(name.endswith("qkv_proj") for name, _ in base.named_modules())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["qkv_proj"] if fused else ["q_proj", "v_proj"]))
    add_differential(model, config_of(host, preset))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    has_gradient = set()
    for update in range(UPDATES):
        set_progress(model, (update + 1) / UPDATES)
        optimizer.zero_grad()
        run(base, batch).log_softmax(-1)[..., 5].mean().neg().backward()
        optimizer.step()
        has_gradient |= {name for name, p in trained.items() if 0 < p.grad.abs().max() < torch.inf}
    return has_gradient == set(trained)


def is_saved(host: Host, preset: str, implementation: str) -> bool:
    """Whether a saved and reloaded model gives the same outputs."""
    model, batch = make_model(host, implementation), make_batch(host)
    add_differential(model, config_of(host, preset))
    stir(model)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        loaded = from_pretrained(folder, attn_implementation=implementation)
        return bool((run(loaded, batch) - run(model, batch)).abs().max() < TOLERANCE)


def measure(host: Host, preset: str) -> str:
    """The letters of the claims that hold with every attention implementation, or why the preset is refused."""
    try:
        add_differential(make_model(host), config_of(host, preset))
    except UserError as error:
        return f"refused: {error}"
    claims = {"E": is_exact, "C": is_cached, "T": is_trained, "S": is_saved}
    if isinstance(host.make(), hf.CLIPVisionConfig):
        del claims["C"]
    return "".join(
        letter for letter, claim in claims.items() if all(claim(host, preset, i) for i in host.implementations)
    )


# ---- the table
@dataclass
class Config:
    output: str = str(ROOT / "benchmarks" / "results" / "bridge.json")
    page: str = str(ROOT / "docs" / "bridge.md")  # page whose table is replaced


def format_table(results: dict[str, dict[str, str]]) -> str:
    """Markdown: a row for each model, a column for each preset."""
    lines = ["| | " + " | ".join(f"`{preset}`" for preset in PRESETS) + " |", "|---" * (len(PRESETS) + 1) + "|"]
    for host, row in results.items():
        cells = ["-" if row[preset].startswith("refused") else row[preset] for preset in PRESETS]
        lines.append(f"| {host} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    config = tyro.cli(Config, use_underscores=True)
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    torch.set_num_threads(1)
    results = {}
    for name, host in HOSTS.items():
        results[name] = {preset: measure(host, preset) for preset in PRESETS}
        print(name, results[name], flush=True)
    result = {"date": time.strftime("%Y-%m-%d"), "transformers": hf.__version__, "models": results}
    Path(config.output).write_text(json.dumps(result, indent=1) + "\n")
    page = Path(config.page)
    before, _, after = page.read_text().partition("| | `split`")
    after = after.partition("\n\n")[2]
    page.write_text(before + format_table(results) + "\n\n" + after)


if __name__ == "__main__":
    main()
