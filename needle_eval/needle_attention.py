"""How much attention the answer pays to the needle (second table of arXiv 2507.15875; here for every layer)."""

import torch

from diagnostics import answer_attention, needle_share
from errors import UserError
from needle_eval.questions import Question, open_reference
from needle_eval.runner import Answerer
from processing_paligemma import stack_inputs
from vision_cache import FeatureStore


def measure_needle_attention(answerer: Answerer, questions: list[Question], count: int) -> dict[str, dict]:
    """By setting and layer: the attention of the answer's tokens on the needle's patches, as a share of all images'.

    Mean over the true answer's tokens and the first `count` positives; `even` is the share under uniform attention.
    """
    found = {}
    for setting in dict.fromkeys(question.setting for question in questions):
        positives = [q for q in questions if q.setting == setting and q.fields["kind"] == "positive"]
        shares = [share for q in positives[:count] if (share := needle_attention(answerer, q)) is not None]
        if shares:
            images, grid, _ = positives[0].fields["shape"]
            mean = torch.stack(shares).mean(0).tolist()
            even = 1 / (images * grid**2)
            found[setting] = {"n": len(shares), "even": even, "share": [round(x, 4) for x in mean]}
    return found


def needle_attention(answerer: Answerer, question: Question) -> torch.Tensor | None:
    """The needle's share of the attention in every layer, averaged over the tokens of the true answer: [layers]. None
    for a broken question and for several needles."""
    images, grid, needles = question.fields["shape"]
    if question.error or needles > 1:
        return None
    processor = answerer.processor
    try:
        pixels = {image: processor.image_inputs(open_reference(image)) for image in question.images}
        features = FeatureStore(answerer.model).encode(list(question.images), pixels, answerer.batch_size)
        row = processor.encode(question.prompt, question.ground_truth, [len(image) for image in features])
    except UserError:  # its answer row has the error
        return None
    inputs = stack_inputs([pixels[image] for image in question.images]) | processor.pad([row])
    batch = {key: tensor.to(answerer.accelerator.device) for key, tensor in inputs.items()}
    batch |= {"pixel_values": None, "image_features": features}
    attention = answer_attention(answerer.model, batch)[0, :, 0].float()  # [layers, T, M N]
    place = tuple(int(n) - 1 for n in question.ground_truth.split(", "))
    return needle_share(attention, place, images, grid).mean(1)
