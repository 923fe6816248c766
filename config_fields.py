"""Types of the fields of config.json and what reads them; constants that the models and processors share."""

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
PALIGEMMA_IMAGE_TOKEN_ID = 257_152  # <image>
DECODER_ALONE = "the model is a decoder alone (model_type phi3): leave the images out"  # message of a UserError

Config = TypeVar("Config")


def read_config(cls: type[Config], data: dict, name: str) -> Config:
    """The fields of a config dataclass from a part of config.json, called `name` in messages; others are ignored.

    Raises UserError for a value of another type or out of range.
    """
    known = {field.name: data[field.name] for field in fields(cls) if field.name in data}
    try:
        return msgspec.convert(known, cls)
    except msgspec.ValidationError as error:
        raise UserError(f"{name}: {describe(error)}: restore the file") from error
