"""Code paths of a CUDA device on CPU tensors: paths are chosen as on CUDA, and kernels that a CPU lacks are computed by
their formulas (pretend_cuda.py). Launches and syncs are counted for one update of a model with PaliGemma 3b's 18 + 27
layers.
"""

import contextlib
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pretend_cuda
import pytest
import tiny
import torch
from runs import logged

import attention
import finetune_original
import fused_ops
import machine
import modeling_vlm
import training
from attention import DENSE_MAX_KEYS, PrefixMask, choose_path, kernels_of
from attention_formula import attention_reference, blended_reference
from differential_attention import PRESETS, add_differential, unfreeze_differential
from errors import UserError
from modeling_gemma import PaliGemmaForConditionalGeneration
from modeling_vlm import choose_step_decoder

RAGGED = {  # rows of (prefix, suffix) tokens, padded on the left to nine
    "alike": [(5, 4), (5, 4)],
    "ragged": [(5, 4), (3, 2), (6, 1)],
    "prompts": [(9, 0), (4, 0)],
    "with a row of pads": [(3, 0), (4, 5), (0, 0)],
    "long suffixes": [(2, 7), (1, 8)],
    "no prefix": [(0, 9), (0, 4)],
    "no row without pads": [(0, 5), (0, 4)],
    "no row without pads, alike": [(0, 5), (0, 5)],
}


def left_padded(rows: list[tuple[int, int]], length: int = 9) -> PrefixMask:
    valid = torch.tensor([[0] * (length - p - s) + [1] * (p + s) for p, s in rows])
    types = torch.tensor([[0] * (length - s) + [1] * s for _, s in rows])
    return PrefixMask.from_tensors(valid, types)


def is_token(mask: PrefixMask, queries: int, keys: int) -> torch.Tensor:
    """[B, 1, L, 1]: True for queries that are not pads."""
    return (torch.arange(keys - queries, keys) >= mask.start[:, None])[:, None, :, None]


@pytest.mark.parametrize("queries", [9, 6, 4, 2])
@pytest.mark.parametrize("rows", RAGGED)
def test_two_calls_of_flash_attention_are_the_prefix_mask(rows, queries, monkeypatch):
    """Forward and gradients in float64, standard and blended, with shared and separate keys."""
    pretend_cuda.force(monkeypatch)
    monkeypatch.setattr(attention, "choose_path", lambda *args: "varlen")
    torch.manual_seed(0)
    mask = left_padded(RAGGED[rows])
    q1, q2 = (torch.randn(len(mask.start), 4, queries, 8, dtype=torch.double, requires_grad=True) for _ in range(2))
    k, v, own = (torch.randn(len(mask.start), h, 9, 8, dtype=torch.double, requires_grad=True) for h in (2, 2, 4))
    dense, real = mask.dense(queries, 9), is_token(mask, queries, 9)
    weight = torch.tensor([0.7], dtype=torch.double, requires_grad=True)
    pairs = [
        (attention.attention(q1, k, v, mask, 0.5), attention_reference(q1, k, v, dense, 0.5)),
        *(
            (
                attention.blended_attention(q1, q2, keys, v, mask, 0.5, weight, True),
                blended_reference(q1, q2, *halves, v, dense, 0.5, weight / (1 + weight), True),
            )
            for keys, halves in ((k, (k, k)), (own, own.chunk(2, dim=1)))
        ),
    ]
    leaves = (q1, q2, k, v, own, weight)
    for found, expected in pairs:
        torch.testing.assert_close(found * real, expected * real, atol=1e-12, rtol=0)
        direction = torch.randn_like(found) * real
        grads = (torch.autograd.grad(out, leaves, direction, allow_unused=True) for out in (found, expected))
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_both_arms_start_bit_equal_on_every_path_of_a_gpu(monkeypatch):
    """Equal queries, in bfloat16, at lengths and with options for every path: the same kernel serves both arms."""
    taken = Counter()
    pretend_cuda.force(monkeypatch, taken)
    torch.manual_seed(0)
    for length, options in ((9, {}), (9, dict(softcap=5.0)), (530, dict(softcap=5.0)), (530, dict(window=40))):
        mask = left_padded([(length - 4, 4), (length - 3, 2)], length)
        q, k, v = (torch.randn(2, h, length, 16).bfloat16() for h in (4, 2, 2))
        standard = attention.attention(q, k, v, mask, 0.25, **options)
        blended = attention.blended_attention(q, q, k, v, mask, 0.25, torch.tensor([1.5]), True, **options)
        assert torch.equal(standard, blended)
    assert taken == {"varlen": 2, "maps": 2, "flex": 4}


@pytest.mark.parametrize("options", [dict(softcap=2.0), dict(window=3), dict(softcap=2.0, window=3), dict(wide=True)])
def test_flex_attention_is_the_formula(options, monkeypatch):
    """Its forward pass in float64, for cases where flash attention has no kernel; a CPU has no backward pass for it."""
    options = dict(options)
    monkeypatch.setattr(attention, "choose_path", lambda *args: "flex")
    torch.manual_seed(0)
    mask, value = left_padded(RAGGED["ragged"]), 16 if options.pop("wide", False) else 8
    q1, q2, k = (torch.randn(3, h, 9, 8, dtype=torch.double) for h in (4, 4, 2))
    v, gamma = torch.randn(3, 2, 9, value, dtype=torch.double), torch.tensor([0.7], dtype=torch.double)
    dense, softcap, real = mask.dense(9, 9, options.get("window")), options.get("softcap"), is_token(mask, 9, 9)
    found = attention.attention(q1, k, v, mask, 0.5, **options)
    torch.testing.assert_close(found * real, attention_reference(q1, k, v, dense, 0.5, softcap) * real)
    found = attention.blended_attention(q1, q2, k, v, mask, 0.5, gamma, True, **options)
    expected = blended_reference(q1, q2, k, k, v, dense, 0.5, gamma / (1 + gamma), True, softcap)
    torch.testing.assert_close(found * real, expected * real)


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_flex_attention_compiles_to_one_graph_with_gradients(softcap, window, monkeypatch):
    """As on a GPU, except for the kernel, which aot_eager computes by its formula."""
    module = attention.flex_module()
    monkeypatch.setattr(module, "_validate_device", lambda *_: None)  # torch refuses a backward pass on a CPU
    compiled = torch.compile(module.flex_attention, dynamic=True, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(module, "flex_attention", compiled)
    torch.manual_seed(0)
    mask = left_padded([(500, 40), (530, 10)], 540)
    leaves = [torch.randn(2, h, 540, 16, requires_grad=True) for h in (4, 2, 2)]
    real = is_token(mask, 540, 540)
    found = attention.flex(*leaves, mask, 0.25, softcap, window) * real
    expected = attention_reference(*leaves, mask.dense(540, 540, window), 0.25, softcap) * real
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    grads = (torch.autograd.grad(out.square().sum(), leaves) for out in (found, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


def test_paths_of_a_gpu():
    def path(
        keys=300,
        queries=None,
        width=16,
        value=16,
        dtype=torch.bfloat16,
        softcap=None,
        window=None,
        mask=True,
        on="cuda",
    ):
        q, k, v = (
            torch.empty(2, 4, n, d, dtype=dtype) for n, d in ((queries or keys, width), (keys, width), (keys, value))
        )
        rows = left_padded([(keys - 4, 4), (keys - 5, 3)], keys) if mask else None
        return choose_path(q, k, v, rows, softcap, window, on)

    assert path() == path(width=256, value=256) == "varlen"
    assert path(mask=False) == path(dtype=torch.float32) == path(width=264, value=264) == "sdpa"
    assert path(queries=1) == path(softcap=5.0) == path(value=32) == "maps"
    assert path(600, softcap=5.0) == path(600, value=32) == path(window=20) == "flex"
    assert path(600, softcap=5.0, dtype=torch.float32) == "chunks"
    assert path(on="hopper") == path(DENSE_MAX_KEYS, on="hopper") == "sdpa"
    assert path(DENSE_MAX_KEYS + 1, on="hopper") == "varlen" and path(600, softcap=5.0, on="hopper") == "flex"
    assert path(on="sdpa") == path(window=20, on="sdpa") == "sdpa"  # an older GPU, or another kind of device
    assert path(600, softcap=5.0, on="sdpa") == path(600, value=32, on="sdpa") == "chunks"
    right = PrefixMask.from_tensors(torch.tensor([[1, 1, 0], [1, 1, 1]]))
    x = torch.empty(2, 1, 3, 8).bfloat16()
    assert choose_path(x, x, x, right, None, None, "cuda") == "sdpa"  # padded on the right
    assert choose_path(x, x, x, PrefixMask.from_tensors(torch.ones(2, 3)), None, None, "cuda") == "sdpa"  # no mask


@pytest.mark.parametrize(
    ("device", "capability", "kernels"),
    [
        ("cpu", None, "cpu"),
        ("cuda", (9, 0), "hopper"),
        ("cuda", (10, 0), "cuda"),
        ("cuda", (8, 0), "cuda"),
        ("cuda", (7, 5), "sdpa"),
        ("mps", None, "sdpa"),
    ],
)
def test_only_cards_with_flash_attention_get_its_paths(device, capability, kernels, monkeypatch):
    """A T4 and Apple's GPUs only have SDPA."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert kernels_of(torch.device(device)) == kernels


# ---- one update of 18 + 27 layers: launches and syncs
@pytest.fixture(scope="module")
def deep_model(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("deep-model")
    pretend_cuda.write_deep_model(tiny_model, folder)
    return folder


@pytest.mark.parametrize(("preset", "launches"), [(None, 3200), ("split", 4300)])
def test_launches_and_waits_of_an_update(preset, launches, deep_model, tmp_path, monkeypatch):
    """The training loop on a ragged batch of 8 in bfloat16; logging may sync two more times."""
    plain, logged = pretend_cuda.count_updates(deep_model, tmp_path, preset, monkeypatch)
    print(f"{preset or 'standard'}: {plain[0]:,} launches, {plain[1]} waits; logged {logged[0]:,}, {logged[1]}")
    assert launches // 2 < plain[0] <= launches
    assert plain[1] <= 1 and logged[1] <= 3


def test_the_head_loss_of_a_large_vocabulary_takes_few_launches():
    """Counted on the meta device, at full size."""
    options, rows = dict(dtype=torch.bfloat16, device="meta"), pretend_cuda.LABEL_ROWS
    hidden = torch.empty(rows, 2048, requires_grad=True, **options)
    head = torch.nn.Linear(2048, pretend_cuda.VOCABULARY, bias=False, **options).requires_grad_(False)
    labels = torch.empty(rows, dtype=torch.long, device="meta")
    with pretend_cuda.Counts() as counts:
        fused_ops.head_loss(hidden, head, labels, None).backward()
    launches, syncs = counts.take()
    print(f"head loss: {launches} launches")
    assert launches <= 200 and syncs == 0


@pytest.mark.parametrize("rows", [1, 8, 430, 512, 5000, 40_000])
def test_tiles_of_the_loss_keep_rows_of_logits_aligned_and_small(rows):
    """On a GPU: to whole tiles of a CPU, and to the memory limit unless one such tile is larger."""
    size = fused_ops.tile_size(rows, "cuda")
    assert size % fused_ops.TILE == 0
    assert size == fused_ops.TILE or rows * size <= fused_ops.GPU_TILE_LOGITS < rows * (size + fused_ops.TILE)


# ---- decoding on tensors of fixed shape and address
@pytest.mark.parametrize("preset", [None, "split", "difflora", "v1_width"])
@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_decoding_on_a_fixed_cache_gives_the_same_tokens(family, preset, monkeypatch):
    """Ragged prompts, windows and soft-caps; logits equal in float64."""
    model = tiny.ours_like(tiny.hf_model(family))
    if preset:
        add_differential(model, preset)
    model, seen = model.double(), []
    model.config.eos_token_id = -1
    monkeypatch.setattr(modeling_vlm, "sample", lambda logits, *_: seen.append(logits.clone()) or logits.argmax(-1))
    prompts = tiny.prompts(prefixes=(5, 2, 3))
    prompts["pixel_values"] = prompts["pixel_values"].double()
    grown = model.generate(**prompts, max_new_tokens=7)
    monkeypatch.setattr(modeling_vlm, "choose_step_decoder", lambda _: choose_step_decoder("cuda"))
    assert torch.equal(model.generate(**prompts, max_new_tokens=7), grown)
    for a, b in zip(seen[:7], seen[7:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_only_cuda_decodes_on_a_fixed_cache():
    """Other devices cannot capture a graph, for which they would pay with whole buffers in every step."""
    assert choose_step_decoder("cuda") is modeling_vlm.StaticStepDecoder
    assert {choose_step_decoder(device) for device in ("cpu", "mps", "xpu")} == {modeling_vlm.StepDecoder}


def test_a_kept_cache_gives_the_tokens_of_a_new_one(monkeypatch):
    """The cache still holds answers to other prompts; a batch of another size, or a longer one, gets a new cache."""
    model, made = tiny.ours_like(tiny.hf_model("gemma")), []
    model.config.eos_token_id = -1
    monkeypatch.setattr(modeling_vlm, "choose_step_decoder", lambda _: choose_step_decoder("cuda"))
    graphs = modeling_vlm.GraphCache()
    for prefixes, new in (((9, 4, 4), 7), ((5, 2, 3), 5), ((5, 2), 5), ((5, 2), 60), ((3, 2), 60)):
        prompts = tiny.prompts(prefixes=prefixes)
        expected = model.generate(**prompts, max_new_tokens=new)
        assert torch.equal(model.generate(**prompts, max_new_tokens=new, graphs=graphs), expected)
        made.append(graphs.decoder)
    first, second, third, fourth, fifth = map(id, made)
    assert first == second != third != fourth == fifth


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_decoded_token_waits_once(with_adapter, deep_model, monkeypatch):
    model = PaliGemmaForConditionalGeneration.from_pretrained(deep_model, dtype=torch.bfloat16)
    if with_adapter:
        training.new_lora(finetune_original.Config(), model)
    model.config.eos_token_id = -1
    pretend_cuda.force(monkeypatch)
    monkeypatch.setattr(modeling_vlm, "choose_step_decoder", lambda _: choose_step_decoder("cuda"))
    ids = torch.randint(5, 90, (2, 6))
    batch = dict(input_ids=ids, pixel_values=None, attention_mask=torch.ones_like(ids))
    taken = []
    with pretend_cuda.Counts() as counts:
        for tokens in (2, 3, 4):
            model.generate(**batch, max_new_tokens=tokens)
            taken.append(counts.take())
    launches, syncs = (more - fewer for fewer, more in zip(*taken[1:], strict=True))
    print(f"a token{' with an adapter' if with_adapter else ''}: {launches} launches, {syncs} waits")
    assert syncs == 1


# ---- torch.compile
@pytest.mark.parametrize("preset", [None, "split"])
def test_a_decoder_layer_is_one_graph_for_ragged_batches(preset, monkeypatch):
    """No graph breaks, and at most two graphs for five batches of different lengths."""
    pretend_cuda.force(monkeypatch)
    model = tiny.ours_like(tiny.hf_model("gemma"))
    if preset:
        add_differential(model, preset)
    model = model.to(torch.bfloat16)
    training.new_lora(finetune_original.Config(), model.requires_grad_(False))
    unfreeze_differential(model.train())
    batches = [tiny.batch(prefixes=(5, n), suffixes=(3, 1 + n), side="left", seed=n) for n in range(1, 6)]
    losses = []
    torch._dynamo.reset()
    for compiled in (False, True):
        if compiled:
            model.model.language_model.layers[1].compile(backend="eager", fullgraph=True, dynamic=True)
            torch._dynamo.utils.counters.clear()
        for batch in batches:
            plan = model.model.plan(**batch).to("cpu")
            plan.mask.segments(*2 * [batch["input_ids"].shape[1]])
            with torch.autocast("cpu", torch.bfloat16), fused_ops.cast_lora(fused_ops.lora_layers(model)):
                loss = model(**batch, plan=plan).loss
                loss.backward()
            losses.append(loss.item())
    assert losses[:5] == losses[5:]
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


FAST_TO_TRACE = ("v2", "v1_width")  # another test traces `split`
PRESETS_TO_TRACE = [pytest.param(p, marks=() if p in FAST_TO_TRACE else pytest.mark.slow) for p in PRESETS]


@pytest.mark.parametrize("preset", PRESETS_TO_TRACE)
def test_a_layer_of_every_preset_is_one_graph(preset, monkeypatch):
    """No graph breaks on the paths of a GPU: variable-length attention, and explicit maps for wide values."""
    pretend_cuda.force(monkeypatch)
    model = tiny.ours_like(tiny.hf_model("gemma", num_key_value_heads=2))
    add_differential(model, preset)
    model = model.to(torch.bfloat16)
    training.new_lora(finetune_original.Config(), model.requires_grad_(False))
    unfreeze_differential(model.train())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.model.language_model.layers[1].compile(backend="eager", fullgraph=True, dynamic=True)
    batch = tiny.batch(side="left")
    with torch.autocast("cpu", torch.bfloat16), fused_ops.cast_lora(fused_ops.lora_layers(model)):
        loss = model(**batch).loss
    assert loss.isfinite() and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def losses_and_gradients(model, batches: list[dict]) -> list[list[torch.Tensor]]:
    results = []
    for batch in batches:
        model.zero_grad(set_to_none=True)
        pixels = batch["pixel_values"].double()
        with fused_ops.cast_lora(fused_ops.lora_layers(model)):
            loss = model(**batch | dict(pixel_values=pixels), plan=model.model.plan(**batch)).loss
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    return results


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("preset", [None, "split"])
@pytest.mark.parametrize(("path", "count"), [("varlen", 4), ("sdpa", 7)])
def test_compiled_layers_are_the_model_in_float64(path, count, preset, backend, monkeypatch):
    """Losses and gradients of four ragged batches with variable-length attention and with dense masks; the code
    compiled for the first batch, or with dense masks for the first two, is used for the others."""
    monkeypatch.setattr(attention, "choose_path", lambda q, k, v, mask, *_: "sdpa" if mask is None else path)
    model = tiny.ours_like(tiny.hf_model("gemma", amplify=1.0))
    if preset:
        add_differential(model, preset)
    adapted = training.new_lora(finetune_original.Config(), model.requires_grad_(False))
    adapted.double()
    for name, p in adapted.named_parameters():
        if "lora_B" in name or "second_up" in name:
            torch.nn.init.normal_(p, std=0.1)
    unfreeze_differential(model.train())
    batches = [tiny.batch(prefixes=(5, n), suffixes=(3, 1 + n), side="left", seed=n) for n in range(1, 5)]
    expected = losses_and_gradients(model, batches)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    machine.compile_layers(model, backend)
    first = 1 if path == "varlen" else 2
    found = losses_and_gradients(model, batches[:first])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found += losses_and_gradients(model, batches[first:])
    tolerance = dict(atol=1e-10, rtol=1e-8) if backend == "aot_eager" else dict(atol=1e-6, rtol=1e-4)
    for a, b in zip(sum(found, []), sum(expected, []), strict=True):  # the norms round to float32
        torch.testing.assert_close(a, b, **tolerance)
    # the tower, the first decoder layer, whose input has no gradient, the middle one and the last; with dense masks the
    # decoder layers are compiled twice; torch allows 8 graphs for the code of a layer
    assert graphs == torch._dynamo.utils.counters["stats"]["unique_graphs"] == count
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_the_flag_compile_changes_no_result(tiny_model, tmp_path, monkeypatch):
    """A run in bfloat16 on the paths of a GPU: the same losses and answers, one graph for batches of all lengths; the
    evaluations compile nothing."""
    pretend_cuda.force(monkeypatch)
    compile_layers, compiled = machine.compile_layers, []
    monkeypatch.setattr(training, "compile_layers", lambda model: compiled.append(compile_layers(model, "eager")))
    lines = []
    for name, value in (("plain", False), ("compiled", True)):
        config = tiny.quick(finetune_original.Config, tiny_model, tmp_path / name, max_steps=4, dtype="bfloat16")
        torch._dynamo.utils.counters.clear()
        finetune_original.finetune(replace(config, compile=value), "original")
        lines.append([logged(config), logged(config, "eval")])
    assert lines[0] == lines[1] and len(lines[0][0]) == 4 and len(compiled) == 1
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3 + 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_a_static_cache_takes_keys_of_another_dtype():
    """As under autocast, where the projections of a float32 model are bfloat16."""
    model = tiny.ours_like(tiny.hf_model("gemma"))
    caches = [modeling_vlm.KVCache(model.model.language_model, 2, 4, torch.float32, "cpu") for _ in range(2)]
    k, v = (torch.randn(2, 1, 1, 16).bfloat16() for _ in range(2))
    caches[0].zero_unwritten()
    caches[0].make_static(torch.zeros(1, dtype=torch.long))
    for found, expected in zip(*(cache.update(1, k, v) for cache in caches), strict=True):
        assert torch.equal(found[:, :, :1], expected) and not found[:, :, 1:].any()


def test_factors_cast_once_give_the_same_bits(tiny_model):
    model = PaliGemmaForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.bfloat16)
    adapted = training.new_lora(finetune_original.Config(), model)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    ids = torch.randint(5, 90, (2, 6))
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.ones_like(ids), labels=ids)
    results = []
    for context in (contextlib.nullcontext(), fused_ops.cast_lora(fused_ops.lora_layers(model))):
        adapted.zero_grad()
        with context:
            if results:  # generate inside the block, with a block of its own
                with fused_ops.cast_lora(fused_ops.lora_layers(model)):
                    pass
                assert any(hasattr(module, fused_ops.CAST_FACTORS) for module in model.modules())
            loss = model(**batch).loss
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in adapted.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not any(hasattr(module, fused_ops.CAST_FACTORS) for module in model.modules())


@pytest.mark.parametrize(
    ("trains", "flags"),
    [(True, "lower --batch_size.*--accumulation.*--gradient_checkpointing"), (False, "lower --eval_batch_size")],
)
def test_a_gpu_out_of_memory_is_one_line_that_names_the_flags(tiny_model, tmp_path, monkeypatch, trains, flags):
    real = PaliGemmaForConditionalGeneration.label_loss

    def full(*args, **kwargs):
        if torch.is_grad_enabled() == trains:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the documentation")
        return real(*args, **kwargs)

    monkeypatch.setattr(PaliGemmaForConditionalGeneration, "label_loss", full)
    with pytest.raises(UserError, match=flags) as caught:
        finetune_original.finetune(tiny.quick(finetune_original.Config, tiny_model, tmp_path, max_steps=1), "original")
    assert "\n" not in str(caught.value)


# ---- decisions by device
@pytest.mark.parametrize("supported", [True, False])
def test_auto_is_bfloat16_only_where_the_gpu_computes_in_it(supported, monkeypatch):
    """An older GPU would emulate it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    expected = torch.bfloat16 if supported else torch.float32
    assert machine.choose_dtype("auto", torch.device("cuda"))[0] == expected
    assert machine.choose_dtype("auto", torch.device("cpu"))[0] == torch.float32


def test_workers_load_data_beside_a_gpu_only():
    assert machine.choose_workers(-1, torch.device("cpu")) == 0 < machine.choose_workers(-1, torch.device("cuda"))
    assert machine.choose_workers(3, torch.device("cpu")) == machine.choose_workers(3, torch.device("cuda")) == 3


@pytest.mark.parametrize(("memory", "is_small"), [(99 * 1024, True), (227 * 1024, False)])  # of a 4090 and an H100
def test_flex_attention_gets_small_tiles_where_shared_memory_is_small(memory, is_small, monkeypatch):
    properties = SimpleNamespace(shared_memory_per_block_optin=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for dim in (128, 256):
        q = SimpleNamespace(device=torch.device("cuda"), shape=(1, 8, 100, dim))
        assert (attention.flex_tiles(q) is not None) == (is_small and dim == 256)
