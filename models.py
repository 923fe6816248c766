"""From the `model_type` of config.json to the classes of a family."""

from pathlib import Path

from checkpoint import locate, resolve_run
from errors import UserError
from files import read_json
from modeling_vlm import VisionLanguageModel
from processing_paligemma import PaliGemmaProcessor

SUPPORTED = ("paligemma", "differential_paligemma")


def classes_of(path_or_hub_id: str | Path) -> tuple[type[VisionLanguageModel], type[PaliGemmaProcessor]]:
    """(model class, processor class) of a hub id, a model folder or a run folder.

    Raises UserError for a model_type that is not supported.
    """
    folder = locate(resolve_run(path_or_hub_id)[0])
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type in ("paligemma", "differential_paligemma"):
        from modeling_gemma import PaliGemmaForConditionalGeneration

        return PaliGemmaForConditionalGeneration, PaliGemmaProcessor
    raise UserError(f"{folder / 'config.json'}: model_type {model_type!r} is not supported: {', '.join(SUPPORTED)}")
