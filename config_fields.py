"""Field types of config.json and the function that reads them; constants shared by models and processors."""

from dataclasses import fields
from typing import Annotated, TypeVar

import msgspec

from errors import UserError
from files import describe

Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
Depth = Annotated[int, msgspec.Meta(ge=1, le=1024)]  # number of layers
TokenId = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Positive = Annotated[float, msgspec.Meta(gt=0)]

IGNORED_LABEL = -100  # the loss skips it
PHI_TYPES = ("phi3", "phi3_v")  # model_type of a decoder alone, and with a vision tower
QUESTION_TASK = "answer en "  # PaliGemma's task prefix of a question; left out for a chat model
PALIGEMMA_IMAGE_TOKEN_ID = 257_152  # <image>
DECODER_ALONE_MESSAGE = "the model is a decoder alone (model_type phi3): leave the images out"

Config = TypeVar("Config")


def read_config(cls: type[Config], data: dict, name: str) -> Config:
    """A config dataclass filled from a part of config.json, called `name` in messages; other fields are ignored.

    Raises UserError for a value of the wrong type or out of range.
    """
    known = {field.name: data[field.name] for field in fields(cls) if field.name in data}
    try:
        return msgspec.convert(known, cls)
    except msgspec.ValidationError as error:
        raise UserError(f"{name}: {describe(error)}: restore the file") from error
