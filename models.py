"""Maps the `model_type` of config.json to the classes of a model family."""

from pathlib import Path

from checkpoint import DIFFERENTIAL_PREFIX, base_folder
from config_fields import PHI_TYPES
from errors import UserError
from files import read_json
from modeling_vlm import VisionLanguageModel
from processing_paligemma import PaliGemmaProcessor, Processor
from processing_phi3v import Phi3Processor, Phi3VProcessor

SUPPORTED = ("paligemma", *PHI_TYPES)


def classes_of(path_or_hub_id: str | Path) -> tuple[type[VisionLanguageModel], type[Processor]]:
    """(model class, processor class) of a hub id, a model folder or a run folder.

    Raises UserError for a model_type that is not supported.
    """
    folder = base_folder(path_or_hub_id)
    stored = read_json(folder / "config.json").get("model_type")
    model_type = str(stored).removeprefix(DIFFERENTIAL_PREFIX)
    if model_type == "paligemma":
        from modeling_gemma import PaliGemmaForConditionalGeneration

        return PaliGemmaForConditionalGeneration, PaliGemmaProcessor
    if model_type in PHI_TYPES:
        from modeling_phi3 import Phi3ForCausalLM, Phi3VForCausalLM

        is_decoder = model_type == "phi3"
        return (Phi3ForCausalLM, Phi3Processor) if is_decoder else (Phi3VForCausalLM, Phi3VProcessor)
    raise UserError(f"{folder / 'config.json'}: model_type {stored!r} is not supported: {', '.join(SUPPORTED)}")
