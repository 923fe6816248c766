"""Image features, encoded once and reused.

`FeatureStore` keeps features under names that the caller gives: an evaluation knows which images repeat before it opens
them. `VisionCache` names them by a hash of what they depend on: the pixels, the weights of tower and projector, their
configuration, dtype, type of device and autocast. So an entry cannot be stale, in memory or on disk: any change gives
a new name. (Rounding may differ between GPUs of different models, which share a name.)

Shapes: n images, N patches (or image tokens, whose number may differ), C hidden size of the decoder.
"""

import hashlib
import os
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from differential_attention import DifferentialAttention
from errors import UserError
from modeling_vlm import ImageFeatures
from processing_paligemma import stack_inputs

HASH_BYTES = 20


class FeatureStore:
    """Features [N, C] of images by name, as `model.model.image_features` gives them."""

    def __init__(self, model: torch.nn.Module):
        self.model = model  # a VisionLanguageModel
        self.entries: dict[Hashable, Tensor] = {}

    @torch.no_grad()
    def encode(
        self, names: list[Hashable], pixels: Mapping[Hashable, dict[str, Tensor]], batch_size: int | None = None
    ) -> ImageFeatures:
        """Features of the named images on the model's device, `batch_size` encoded at once (None: all): [n, N, C], or
        [N, C] of each if N differs.

        `pixels` holds what `image_inputs` of the processor returns, preferably still on the CPU, for the images that
        are not stored yet.
        """
        device = self.model.lm_head.weight.device
        rows = {name: self.find(name) for name in names}
        missing = [name for name, row in rows.items() if row is None]
        if missing:
            size, encoded = batch_size or len(missing), []
            for start in range(0, len(missing), size):
                part = [dict(pixels[name]) for name in missing[start : start + size]]
                for inputs in part:  # before they are stacked in memory that is not pinned; sizes stay on the CPU
                    inputs["pixel_values"] = inputs["pixel_values"].to(device, non_blocking=True)
                encoded += self.model.model.image_features(**stack_inputs(part))
            for name, row in zip(missing, encoded, strict=True):
                rows[name] = row
                self.store(name, row)
        found = tuple(rows[name].to(device, non_blocking=True) for name in names)
        return torch.stack(found) if len({len(row) for row in found}) == 1 else found

    def find(self, name: Hashable) -> Tensor | None:
        """The stored features of an image, or None."""
        return self.entries.get(name)

    def store(self, name: Hashable, row: Tensor):
        """Keep the features of an image."""
        self.entries[name] = row.clone()  # a view would keep the whole batch in memory

    def forget(self, names: Iterable[Hashable]):
        """Drop these images, if they are stored."""
        for name in names:
            self.entries.pop(name, None)


class VisionCache(FeatureStore):
    """Features by content: `features` returns what `model.model.image_features` of a frozen tower would return."""

    def __init__(self, model: torch.nn.Module, memory_gb: float, folder: str | Path = ""):
        """`folder`: where features beyond `memory_gb` of main memory are written, "" for nowhere.

        Raises UserError if the tower or the projector trains or has differential attention: its features change.
        """
        super().__init__(model)
        self.free_bytes = int(memory_gb * 1e9)
        self.folder = Path(folder) if folder else None
        self.hashed_weights, self.weights_hash = None, ""
        parts = self.model.model.vision_tower, self.model.model.multi_modal_projector
        if None in parts:
            raise UserError("--vision_cache_gb: the model is a decoder alone, without images: set it to 0")
        if any(p.requires_grad for part in parts for p in part.parameters()) or any(
            isinstance(module, DifferentialAttention) for part in parts for module in part.modules()
        ):
            raise UserError("--vision_cache_gb: the features of a vision tower that trains change: set it to 0")

    def features(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> ImageFeatures:
        """Features on the model's device of images as the processor returns them, preferably still on the CPU."""
        context = self.context(pixel_values)
        inputs = [{"pixel_values": image} for image in pixel_values]
        if image_sizes is not None:
            inputs = [one | {"image_sizes": size} for one, size in zip(inputs, image_sizes, strict=True)]
        names = [content_name(one, context) for one in inputs]
        return self.encode(names, dict(zip(names, inputs, strict=True)))

    def find(self, name: str) -> Tensor | None:
        path = self.folder / f"{name}.safetensors" if self.folder else None
        if name in self.entries or path is None or not path.is_file():
            return self.entries.get(name)
        try:
            return load_file(path)["features"]
        except (SafetensorError, OSError, KeyError):  # truncated: computed and written again
            return None

    def store(self, name: str, row: Tensor):
        row = row.cpu().clone()
        size = row.numel() * row.element_size()
        if size <= self.free_bytes:
            self.entries[name] = row.pin_memory() if torch.cuda.is_available() else row
            self.free_bytes -= size
        elif self.folder is not None:
            temporary = self.folder / f"{name}.{os.getpid()}.tmp"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                save_file({"features": row}, temporary)
                os.replace(temporary, self.folder / f"{name}.safetensors")
            except (SafetensorError, OSError) as error:
                temporary.unlink(missing_ok=True)
                raise UserError(f"{self.folder}: cannot be written ({error}): free some space") from error

    def context(self, images: Tensor) -> bytes:
        """What features depend on besides the pixels; computed once per batch, since it checks every weight."""
        device = self.model.lm_head.weight.device
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        shape = tuple(images.shape[1:])
        return repr((self.hash_weights(), device.type, autocast, images.dtype, shape, torch.__version__)).encode()

    def hash_weights(self) -> str:
        """Hash of tower and projector, recomputed when one of their tensors was replaced or written to."""
        inner = self.model.model
        state = {**inner.vision_tower.state_dict(), **inner.multi_modal_projector.state_dict()}
        versions = tuple((name, t.data_ptr(), t._version, t.dtype) for name, t in state.items())
        if versions != self.hashed_weights:
            digest = hashlib.blake2b(repr(self.model.config.vision_config).encode(), digest_size=HASH_BYTES)
            for name, tensor in state.items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(as_bytes(tensor))
            self.hashed_weights, self.weights_hash = versions, digest.hexdigest()
        return self.weights_hash


def content_name(inputs: dict[str, Tensor], context: bytes) -> str:
    """Hash of an image's inputs and of `context`, what else its features depend on."""
    digest = hashlib.blake2b(context, digest_size=HASH_BYTES)
    for tensor in inputs.values():
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
