"""Vision features of a frozen tower, computed once per picture and kept: in memory up to a bound, then on disk.

An entry is found by a hash of everything that computes it: the picture's pixels, the weights of tower and projector,
their configuration, dtype, device and autocast. So it cannot be stale: what changed has another name.

Shapes: n pictures, N patches, C the decoder's width.
"""

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from differential_attention import DifferentialAttention
from errors import UserError


class VisionCache:
    """`features` stands in for `model.model.image_features`, with equal results."""

    def __init__(self, model, memory_gb: float, folder: str | Path = ""):
        """`model`: a PaliGemmaForConditionalGeneration; `folder`: where entries beyond `memory_gb` go, "" for nowhere.

        Raises UserError where the tower or the projector trains or holds differential attention: its features change.
        """
        self.model, self.room = model, int(memory_gb * 1e9)
        self.folder = Path(folder) if folder else None
        self.kept: dict[str, Tensor] = {}
        self.seen_weights, self.weights_hash = None, ""
        self.hits = self.misses = 0
        parts = self.model.model.vision_tower, self.model.model.multi_modal_projector
        if any(p.requires_grad for part in parts for p in part.parameters()) or any(
            isinstance(module, DifferentialAttention) for part in parts for module in part.modules()
        ):
            raise UserError("vision_cache_gb keeps the features of a frozen vision tower, and this one trains: give 0")

    @torch.no_grad()
    def features(self, pixel_values: Tensor) -> Tensor:
        """Pictures [n, 3, S, S], best still on the CPU, -> features [n, N, C] on the model's device."""
        device = self.model.lm_head.weight.device
        told = self.told(pixel_values, device)
        keys = [key_of(picture, told) for picture in pixel_values]
        rows = {key: self.find(key) for key in keys}
        missing = [key for key, row in rows.items() if row is None]
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        if missing:
            pictures = pixel_values[[keys.index(key) for key in missing]].to(device)
            computed = self.model.model.image_features(pictures)
            for key, row in zip(missing, computed, strict=True):
                rows[key] = row
                self.keep(key, row)
        return torch.stack([rows[key].to(device, non_blocking=True) for key in keys])

    def find(self, key: str) -> Tensor | None:
        path = self.folder / f"{key}.safetensors" if self.folder else None
        if key in self.kept or path is None or not path.is_file():
            return self.kept.get(key)
        try:
            return load_file(path)["features"]
        except (SafetensorError, OSError, KeyError):  # cut off: computed again, written again
            return None

    def keep(self, key: str, row: Tensor):
        row = row.cpu().clone()  # a batch's row would keep the batch
        size = row.numel() * row.element_size()
        if size <= self.room:
            self.kept[key] = row.pin_memory() if torch.cuda.is_available() else row
            self.room -= size
        elif self.folder is not None:
            temporary = self.folder / f"{key}.{os.getpid()}.tmp"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                save_file({"features": row}, temporary)
                os.replace(temporary, self.folder / f"{key}.safetensors")
            except (SafetensorError, OSError) as error:
                temporary.unlink(missing_ok=True)
                raise UserError(f"{self.folder}: cannot be written ({error}): free some space") from error

    def told(self, pictures: Tensor, device: torch.device) -> bytes:
        """What features follow from beside pixels; asked once a batch, since it looks at every weight."""
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        shape = tuple(pictures.shape[1:])
        return repr((self.weights(), device.type, autocast, pictures.dtype, shape, torch.__version__)).encode()

    def weights(self) -> str:
        """Hash of the tower and the projector, taken again when one of their tensors was replaced or written to."""
        inner = self.model.model
        state = {**inner.vision_tower.state_dict(), **inner.multi_modal_projector.state_dict()}
        now = tuple((name, t.data_ptr(), t._version, t.dtype) for name, t in state.items())
        if now != self.seen_weights:
            digest = hashlib.blake2b(repr(self.model.config.vision_config).encode(), digest_size=20)
            for name, tensor in state.items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(as_bytes(tensor))
            self.seen_weights, self.weights_hash = now, digest.hexdigest()
        return self.weights_hash


def key_of(picture: Tensor, told: bytes) -> str:
    digest = hashlib.blake2b(told, digest_size=20)
    digest.update(as_bytes(picture))
    return digest.hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
