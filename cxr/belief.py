"""May an explanation be believed? Floors that no GAN sets for itself, and why one lies below them."""

from contextlib import suppress

from cxr.checkpoints import Model
from cxr.classifier import useless

PICTURES = ("original", "healthy_end", "middle", "diseased_end", "counterfactual")
LEAST_SSIM = 0.7  # of the reconstruction: below it, it is another picture
LEAST_RISE = 1  # logits, from dose 0 to 1: a classifier that moves less hardly tells them apart
REJECTED = 0.1  # gap in probability above which a reconstruction does not stand for its image


def verdict(numbers: dict, model: Model) -> dict:
    """`believe`, and `warnings`: why not, and what calls for care. numbers: of explanation.json."""
    refused = refusals(numbers, model)
    return {"believe": not refused, "warnings": refused + doubts(numbers, model)}


def rejections(numbers: dict, model: Model) -> list[str]:
    """Why the reconstruction does not stand for the image, if it does not: a gap in probability
    above 0.1, or an encoder's SSIM under the 5th percentile of validation images."""
    lines, n = [], numbers["reconstruction"]
    limit = model.info["thresholds"].get("ssim", -1.0)
    if n["probability_gap"] > REJECTED:
        lines.append(
            f"the reconstruction is too far from the image: the classifier gives it "
            f"{n['probability']:.2f}, the image {numbers['original']['probability']:.2f}"
        )
    if n["ssim_encoder"] < limit:
        lines.append(
            "the reconstruction is too far from the image: the encoder's SSIM is "
            f"{n['ssim_encoder']:.2f}, under validation's {limit:.2f}"
        )
    return lines


def refusals(numbers: dict, model: Model) -> list[str]:
    """Why an explanation is not to be believed, if it is not. None of the floors but the encoder's
    SSIM is set by the GAN itself: a bad one would set a low one."""
    lines, likely = [], numbers["likeness"]
    if likely is not None and likely < model.info["thresholds"].get("likeness", -1):
        lines.append("this does not look like the radiographs the model was trained on")
    if why := _useless(model):
        lines.append(f"the classifier is useless: {why}")
    lines += rejections(numbers, model)
    if numbers["reconstruction"]["ssim"] < LEAST_SSIM:
        lines.append(
            "the reconstruction is another picture: its SSIM is "
            f"{numbers['reconstruction']['ssim']:.2f}, under {LEAST_SSIM}"
        )
    if (rise := numbers["logit"][-1] - numbers["logit"][0]) < -LEAST_RISE:
        lines.append(
            f"the classifier takes this disease for health: its logit falls by {-rise:.2f} from dose 0 "
            "to dose 1; is --target the healthy class?"
        )
    elif rise < LEAST_RISE:
        lines.append(
            f"the classifier hardly answers to this disease: its logit rises by {rise:.2f} from dose "
            f"0 to dose 1, less than {LEAST_RISE}"
        )
    if not numbers["counterfactual"]["flipped"]:
        lines.append("the path does not change the classifier's verdict")
    elif not numbers["counterfactual"]["flipped_overlaid"]:
        lines.append("the overlay does not change the classifier's verdict")
    lines += _unreal(model)
    real = numbers["appearance"] or {"limit": 0}
    strange = [name for name in PICTURES if real.get(name, 0) > real["limit"]]
    if strange:
        told = ", ".join(f"{name.replace('_', ' ')} {real[name]:.1f}" for name in strange)
        lines.append(
            f"these pictures do not look like real radiographs: {told} (99% of real ones are under "
            f"{real['limit']:.1f})"
        )
    return lines


def _unreal(model: Model) -> list[str]:
    """Whether the GAN draws what no radiograph looks like, whatever image it is asked about."""
    with suppress(KeyError, TypeError):  # of an older file nothing is known
        found = model.info["metrics"]["gan"]["appearance"]
        limit = model.info["thresholds"]["appearance_typical"]
        if found > limit:
            line = (
                f"this GAN's random lungs do not look like real radiographs: {found:.1f} (90% of real "
                f"ones are under {limit:.1f}): train it longer, or on more images"
            )
            return [line]
    return []


def _useless(model: Model) -> str | None:
    """Why the model's own classifier is useless, if its metrics are known and say so."""
    if "foreign" not in model.info:
        with suppress(KeyError, TypeError, ValueError):  # of a user's own, nothing is known
            return useless(model.info["metrics"]["classifier"])
    return None


def doubts(numbers: dict, model: Model) -> list[str]:
    """Lines that call for care."""
    lines = []
    if numbers["appearance"] is None:
        lines.append(
            "how real its pictures look is not judged: the model file is of an older cxrgan, without "
            "the reference; train its GAN again"
        )
    if "foreign" in model.info:
        lines.append(
            "another classifier than the one that the GAN was trained for is explained: the dose "
            "axis is the GAN's"
        )
    return lines + [f"a map is missing: {why}" for why in numbers["missing_maps"]]
