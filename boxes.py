"""Boxes as PaliGemma's location tokens and back."""

import re
from collections.abc import Sequence

LOC_STEPS = 1024  # <loc0000> .. <loc1023>: a coordinate is a fraction of the image's side in 1024 steps
LOC_TOKENS = [f"<loc{step:04d}>" for step in range(LOC_STEPS)]
DETECTION = re.compile(r"\s*((?:<loc\d{4}>){4})(?:<seg\d{3}>)*([^<]*)")

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


def boxes_to_locs(boxes: Sequence[Box], labels: Sequence[str], width: int, height: int) -> str:
    """Boxes and their labels as PaliGemma's answer, in the order y0, x0, y1, x1: "<loc0102><loc0204><loc0512><loc0820>
    cat ; ...". width, height: of the image in pixels. A label must not contain ";"."""

    def loc(coordinate: float, side: int) -> str:
        return LOC_TOKENS[min(max(round(coordinate / side * LOC_STEPS), 0), LOC_STEPS - 1)]

    return " ; ".join(
        f"{loc(y0, height)}{loc(x0, width)}{loc(y1, height)}{loc(x1, width)} {label}"
        for (x0, y0, x1, y1), label in zip(boxes, labels, strict=True)
    )


def locs_to_boxes(text: str, width: int, height: int) -> list[tuple[Box, str]]:
    """A detection or segmentation answer as [(box, label)]; malformed parts are skipped."""
    found = []
    for match in map(DETECTION.fullmatch, text.split(";")):
        steps = [int(step) for step in re.findall(r"\d{4}", match[1])] if match else []
        if steps and max(steps) < LOC_STEPS:
            y0, x0, y1, x1 = (step / LOC_STEPS for step in steps)
            found.append(((x0 * width, y0 * height, x1 * width, y1 * height), match[2].strip()))
    return found
