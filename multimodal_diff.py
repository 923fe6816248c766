"""The public names of the Multimodal Differential Transformer: models, processors, differential attention, adapters.

    pip install .
    from multimodal_diff import PaliGemmaForConditionalGeneration, PaliGemmaProcessor

In a checkout the same names are in the flat files beside this one.
"""

from adapters import attach_adapter, load_differential, merge, save_differential
from differential_attention import (
    PRESETS,
    DifferentialAttention,
    DifferentialConfig,
    add_differential,
    differential_config,
    differential_parameters,
)
from errors import UserError
from modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from modeling_phi3 import Phi3Config, Phi3ForCausalLM, Phi3VForCausalLM
from models import classes_of
from processing_paligemma import PaliGemmaProcessor
from processing_phi3v import Phi3Processor, Phi3VProcessor

__all__ = [
    "PRESETS",
    "DifferentialAttention",
    "DifferentialConfig",
    "PaliGemmaConfig",
    "PaliGemmaForConditionalGeneration",
    "PaliGemmaProcessor",
    "Phi3Config",
    "Phi3ForCausalLM",
    "Phi3Processor",
    "Phi3VForCausalLM",
    "Phi3VProcessor",
    "UserError",
    "add_differential",
    "attach_adapter",
    "classes_of",
    "differential_config",
    "differential_parameters",
    "load_differential",
    "merge",
    "save_differential",
]
