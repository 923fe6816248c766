"""Boxes in PaliGemma's answers."""

import re

LOC_STEPS = 1024  # <loc0000> .. <loc1023>: a coordinate is a fraction of the image's side in 1024 steps
LOC_TOKENS = [f"<loc{step:04d}>" for step in range(LOC_STEPS)]
DETECTION = re.compile(r"\s*((?:<loc\d{4}>){4})(?:<seg\d{3}>)*([^<]*)")

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


def locs_to_boxes(text: str, width: int, height: int) -> list[tuple[Box, str]]:
    """A detection or segmentation answer as [(box, label)], with the corners in either order; malformed parts are
    skipped."""
    found = []
    for match in map(DETECTION.fullmatch, text.split(";")):
        steps = [int(step) for step in re.findall(r"\d{4}", match[1])] if match else []
        if steps and max(steps) < LOC_STEPS:
            (y0, y1), (x0, x1) = (sorted(step / LOC_STEPS for step in steps[side::2]) for side in (0, 1))
            found.append(((x0 * width, y0 * height, x1 * width, y1 * height), match[2].strip()))
    return found
