"""Every measure of `evaluation.json`, declared once: its key, meaning, unit, better direction and
kind.

This module imports neither torch nor numpy, so that documents can be made from it quickly.
"""

from dataclasses import dataclass

SHARE = "share"  # share of images for which something holds: the mean of values that are 0 or 1
SCORE = "score"  # the mean of any other number over images
CORRELATION = "correlation"  # from -1 to 1: a mean over images, or the correlation of two columns
AUROC = "AUROC"  # of a score and the labels of all images
GAP = "gap"  # a mean of absolute differences, above 0 by chance alone where images are few
DISTANCE = "distance"  # between sets of images; its spread is over random halvings, see `realism`

INTERVALS = {
    SHARE: "bootstrap over patients; exact binomial interval where all images agree",
    SCORE: "bootstrap over patients",
    CORRELATION: "bootstrap over patients",
    AUROC: "bootstrap over patients; Newcombe's score interval where the AUROC is 1 or 0",
    GAP: "basic bootstrap over patients",
    DISTANCE: "2.5th and 97.5th percentile over 100 random halvings of the patients",
}
NEEDS = {  # what a measure may need, and the message if it is missing
    "independent": "no independent classifier is given (--oracle)",
    "features": "the independent classifier has no method `features` to [N, C]",
    "lungs": "no lungs are found in the explained images",
    "findings": "no CNN of other findings is given (--findings)",
    "source": "the data have no column `source` with several of them",
    "scanner": "the data have no column `scanner` with several of them",
    "masks": "no explained image that is called diseased has a mask of its disease (--masks, --boxes)",
    "tuning": "it is tuned on other validation images that have a mask, and there are none",
    "believed": "no explanation lies above all floors",
    "refused": "no explanation lies under a floor",
    "diseased": "no explained image is diseased",
    "discriminator": "the model file holds no discriminator",
    "swap": "the CNN calls all neighbouring pairs alike",
    "verdict": "no explained image is called diseased, or no training image healthy",
    "time": "the evaluation was stopped before they were measured",
}


@dataclass(frozen=True)
class Measure:
    """A measure: one figure {value, low, high, n} in the `evaluation.json` of `evaluate` or of
    `evaluate-phantoms`."""

    key: str  # its names in the file, joined by dots; `*` stands for a method or a picture
    title: str  # for tables and plots
    kind: str  # a key of INTERVALS
    better: str  # "more", "less", or "" for a figure that only describes or serves to compare
    meaning: str  # one sentence
    unit: str = ""
    needs: tuple[str, ...] = ()  # keys of NEEDS, in the order in which they are checked
    statistic: str = "mean"  # of `columns`: mean, auroc, spearman or mean_pearson
    columns: tuple[str, ...] = ()  # of a phantom's row, if the figure is no mean over images

    @property
    def part(self) -> str:
        return self.key.split(".")[0]

    @property
    def heading(self) -> str:
        return f"{self.title}, {self.unit}" if self.unit else self.title


@dataclass(frozen=True)
class Method:
    """A kind of heat map."""

    name: str  # in the files
    title: str
    asks: str  # what it asks, one of ASKS


OURS, CNN, NOTHING = ASKS = ("ours", "asks the CNN", "asks nothing")
METHODS = {
    method.name: method
    for method in (
        Method("latent_ig", "latent IG", OURS),
        Method("difference", "difference", OURS),
        Method("overlay", "change of the overlay", OURS),
        Method("gradient", "gradient", CNN),
        Method("integrated_gradients", "integrated gradients", CNN),
        Method("grad_cam", "Grad-CAM", CNN),
        Method("centre", "centre", NOTHING),
        Method("edges", "edges", NOTHING),
        Method("random", "random", NOTHING),
        Method("mean_difference", "mean difference", NOTHING),
        Method("lung_mask", "lung mask", NOTHING),
    )
}


# Here, one measure in a line is easier to read than one argument in a line.
# fmt: off
_CLASSIFIER = (
    Measure("classifier.auroc", "AUROC", AUROC, "more",
        "The chance that a diseased image gets a higher logit than a healthy one."),
    Measure("classifier.accuracy", "accuracy", SHARE, "more",
        "Share of images classified correctly at probability 0.5."),
    Measure("classifier.sensitivity", "sensitivity", SHARE, "more",
        "Share of diseased images called diseased."),
    Measure("classifier.specificity", "specificity", SHARE, "more",
        "Share of healthy images called healthy."),
    Measure("classifier.ece", "calibration error", SCORE, "less",
        "Expected calibration error over 15 bins of equal width."),
    Measure("classifier.auroc_gamma", "AUROC, gamma 0.7", AUROC, "more",
        "AUROC of the images at gamma 0.7."),
    Measure("classifier.auroc_blur", "AUROC, blurred", AUROC, "more",
        "AUROC of the images under a 5 x 5 blur."),
    Measure("classifier.auroc_crop", "AUROC, cropped", AUROC, "more",
        "AUROC of the middle 90% of the images."),
    Measure("classifier.auroc_noise", "AUROC, with noise", AUROC, "more",
        "AUROC of the images with noise of 0.05 of the range."),
)
_SHORTCUT = (
    Measure("shortcut.auroc_without_lungs", "AUROC without lungs", AUROC, "less",
        "AUROC of the images with a grey rectangle over the lungs: 0.5 where the CNN looks at lungs "
        "alone.", needs=("lungs",)),
    Measure("shortcut.auroc_lungs_alone", "AUROC, lungs alone", AUROC, "more",
        "AUROC of the images with all but the lungs grey: what is told from them.", needs=("lungs",)),
    *(
        measure
        for kind in ("source", "scanner")
        for measure in (
            Measure(f"{kind}.*.auroc", "AUROC", AUROC, "more",
                f"AUROC of the images of one {kind}.", needs=(kind,)),
            Measure(f"{kind}.*.auroc_without_lungs", "AUROC without lungs", AUROC, "less",
                "The same with a grey rectangle over the lungs.", needs=(kind, "lungs")),
            Measure(f"{kind}.*.auroc_lungs_alone", "AUROC, lungs alone", AUROC, "more",
                "The same with all but the lungs grey.", needs=(kind, "lungs")),
            Measure(f"{kind}.*.sensitivity", "sensitivity", SHARE, "more",
                "Share of its diseased images called diseased.", needs=(kind,)),
            Measure(f"{kind}.*.specificity", "specificity", SHARE, "more",
                "Share of its healthy images called healthy.", needs=(kind,)),
        )
    ),
)
_FEATURES = ("independent", "features")
_GENERATOR = (
    Measure("generator.kid", "KID", DISTANCE, "less",
        "Kernel inception distance of random lungs from real images.", needs=_FEATURES),
    Measure("generator.kid_real", "KID, real", DISTANCE, "",
        "The same of real images from other patients' real images.", needs=_FEATURES),
    Measure("generator.fid", "FID", DISTANCE, "less",
        "Frechet distance of random lungs from real images.", needs=_FEATURES),
    Measure("generator.fid_real", "FID, real", DISTANCE, "",
        "The same of real images from other patients' real images.", needs=_FEATURES),
    Measure("generator.fid_ratio", "FID ratio", DISTANCE, "less",
        "FID over FID, real: 1 where random lungs differ from real ones as real ones do.",
        needs=_FEATURES),
)
_RECONSTRUCTION = (
    Measure("reconstruction.psnr", "PSNR", SCORE, "more",
        "Peak signal-to-noise ratio of the reconstruction against the image.", "dB"),
    Measure("reconstruction.ssim", "SSIM", SCORE, "more",
        "Structural similarity of the reconstruction and the image."),
    Measure("reconstruction.probability_gap", "probability gap", SCORE, "less",
        "How far the CNN's probability of the reconstruction is from that of the image."),
    Measure("reconstruction.rejected", "rejected", SHARE, "less",
        "Share of reconstructions that are too far from their image: a probability gap above 0.1, "
        "or an SSIM of the encoder under the validation images' 5th percentile."),
    Measure("reconstruction.findings_turned", "other findings turned", SCORE, "less",
        "Mean number of other findings whose verdict differs between image and reconstruction.",
        needs=("findings",)),
)
_COUNTERFACTUAL = (
    Measure("counterfactual.l1_original", "change from the original", SCORE, "less",
        "Mean absolute difference of counterfactual and image.", "of the range"),
    Measure("counterfactual.l1_reconstruction", "change from the reconstruction", SCORE, "less",
        "Mean absolute difference of counterfactual and reconstruction.", "of the range"),
    Measure("counterfactual.l1_overlaid", "change, overlay", SCORE, "less",
        "Mean absolute difference of the overlaid counterfactual and the image.", "of the range"),
    Measure("counterfactual.validity", "validity", SHARE, "more",
        "Share of counterfactuals to which this CNN gives the other class."),
    Measure("counterfactual.sparsity", "pixels changed", SCORE, "less",
        "Share of the pixels that differ by more than 0.05 of the range from the reconstruction.",
        "of the pixels"),
    Measure("counterfactual.validity_overlaid", "validity, overlay", SHARE, "more",
        "Share of overlaid counterfactuals to which this CNN gives the other class."),
    Measure("counterfactual.sparsity_overlaid", "pixels changed, overlay", SCORE, "less",
        "Share of the pixels that differ by more than 0.05 of the range from the image.",
        "of the pixels"),
    Measure("counterfactual.oracle_validity", "validity, independent", SHARE, "more",
        "Share of counterfactuals to which the independent classifier gives another class "
        "than this CNN gives the image.", needs=("independent",)),
    Measure("counterfactual.oracle_validity_overlaid", "validity, overlay, independent", SHARE, "more",
        "The same of the overlaid counterfactual.", needs=("independent",)),
    Measure("counterfactual.outside_lung", "change outside lungs", SCORE, "less",
        "Share of the change that lies outside the lungs, those of --lungs or else those found.",
        "of the change", needs=("lungs",)),
    Measure("counterfactual.outside_lung_overlaid", "change outside lungs, overlay", SCORE, "less",
        "The same of the overlaid counterfactual.", "of the change", needs=("lungs",)),
    Measure("counterfactual.outside_area", "area outside the lungs", SCORE, "",
        "Share of the image outside the lungs: the score of a change spread evenly.",
        "of the image", needs=("lungs",)),
    Measure("counterfactual.cout", "COUT", SCORE, "more",
        "Counterfactual transition (Khorram & Fuxin 2022), -1 to 1: how early the CNN's probability "
        "turns while the image's pixels become the counterfactual's, those that differ most first."),
    Measure("counterfactual.cout_overlaid", "COUT, overlay", SCORE, "more",
        "The same of the overlaid counterfactual."),
    Measure("counterfactual.perceptual", "perceptual distance", SCORE, "less",
        "Distance of counterfactual and image in the independent classifier's features, over that "
        "of two patients' images.", "of two images'", needs=_FEATURES),
    Measure("counterfactual.perceptual_overlaid", "perceptual distance, overlay", SCORE, "less",
        "The same of the overlaid counterfactual.", "of two images'", needs=_FEATURES),
    Measure("counterfactual.fid", "FID, counterfactuals", DISTANCE, "less",
        "Frechet distance of the counterfactuals from real images of the class they are turned into.",
        needs=_FEATURES),
    Measure("counterfactual.fid_overlaid", "FID, overlay", DISTANCE, "less",
        "The same of the overlaid counterfactuals.", needs=_FEATURES),
    Measure("counterfactual.fid_real", "FID, real", DISTANCE, "",
        "The same of real images from other patients' real images.", needs=_FEATURES),
    Measure("counterfactual.findings_turned", "other findings turned", SCORE, "less",
        "Mean number of other findings whose verdict differs between image and counterfactual (MNAC, "
        "Rodriguez et al. 2021, without the explained one).", needs=("findings",)),
    Measure("counterfactual.findings_turned_overlaid", "other findings turned, overlay", SCORE, "less",
        "The same of the overlaid counterfactual.", needs=("findings",)),
    Measure("counterfactual.correlation_difference", "correlation difference", GAP, "less",
        "How differently other findings' logits move with this CNN's than they go with it over the "
        "images: the mean absolute difference of correlations, for equal n (after CD, Jeanneret et "
        "al. 2022).", needs=("findings",)),
    Measure("counterfactual.correlation_difference_overlaid", "correlation difference, overlay", GAP,
        "less", "The same of the overlaid counterfactual.", needs=("findings",)),
    Measure("counterfactual.composition", "twice reconstructed", SCORE, "less",
        "Mean absolute difference of the image and its reconstruction's reconstruction (composition, "
        "Monteiro et al. 2023).", "of the range", needs=("time",)),
    Measure("counterfactual.reversibility", "there and back", SCORE, "less",
        "Mean absolute difference of the image and its counterfactual, explained in turn and taken "
        "back to the image's dose (reversibility, Monteiro et al. 2023).", "of the range",
        needs=("time",)),
)
_FINDINGS = tuple(
    Measure(f"finding.*.turned_by_{name}", f"turned by the {picture}", SHARE, "less",
        f"Share of images whose verdict of this finding is another in the {picture}.",
        needs=("findings",))
    for name, picture in (
        ("reconstruction", "reconstruction"),
        ("counterfactual", "counterfactual"),
        ("counterfactual_overlaid", "overlay"),
    )
)
_GATE = (
    Measure("gate.believed", "believed", SHARE, "",
        "Share of explanations that lie above all floors; the others are said not to be believed."),
    Measure("gate.convinces_believed", "convinces, believed", SHARE, "more",
        "Share of the believed ones whose overlay gets another class from the independent classifier "
        "than this CNN gives the image.", needs=("independent", "believed")),
    Measure("gate.convinces_refused", "convinces, refused", SHARE, "",
        "The same of those that are not to be believed.", needs=("independent", "refused")),
)
_PATH = (
    Measure("path.logit_gap", "logit gap", SCORE, "less",
        "Median over the path of the distance between the logit that a dose names and the CNN's.",
        "logits"),
    Measure("path.largest_jump", "largest jump", SCORE, "less",
        "The largest step of the logit from frame to frame, divided by its whole change.",
        "of the change"),
    Measure("path.spearman", "dose and logit", CORRELATION, "more",
        "Spearman's correlation of dose and logit along the path."),
    Measure("path.realism_mid", "realism of mid frames", SCORE, "more",
        "The discriminator's score of the frames from dose 0.25 to 0.75, minus that of the two"
        " ends.", needs=("discriminator",)),
)
_DISENTANGLEMENT = (
    Measure("disentanglement.healthy_at_zero", "healthy at dose 0", SHARE, "more",
        "Share of 512 random lungs that this CNN calls healthy at dose 0."),
    Measure("disentanglement.diseased_at_full", "diseased at dose 1", SHARE, "more",
        "Share of 512 random lungs that this CNN calls diseased at dose 1."),
    Measure("disentanglement.oracle_healthy_at_zero", "healthy at dose 0, independent", SHARE, "more",
        "Share of these lungs that the independent classifier calls healthy at dose 0.",
        needs=("independent",)),
    Measure("disentanglement.oracle_diseased_at_full", "diseased at dose 1, independent", SHARE, "more",
        "Share of these lungs that the independent classifier calls diseased at dose 1.",
        needs=("independent",)),
    Measure("disentanglement.structure_ssim", "SSIM of the path's ends", SCORE, "more",
        "SSIM of the path's two ends where they differ by at most 0.05 of the range."),
    Measure("disentanglement.outside_lung_ssim", "SSIM outside the lungs", SCORE, "more",
        "SSIM of the path's two ends outside the lungs.", needs=("lungs",)),
    Measure("disentanglement.lung_overlap", "overlap of the ends' lungs", SCORE, "more",
        "Intersection over union of the lungs found in the path's two ends.", needs=("lungs",)),
    Measure("disentanglement.inverted_healthy", "inverted image healthy at dose 0", SHARE, "more",
        "Share of diseased images whose lungs this CNN calls healthy at dose 0.",
        needs=("diseased",)),
    Measure("disentanglement.oracle_inverted_healthy", "inverted image healthy at dose 0, independent", SHARE, "more",
        "Share of diseased images whose lungs the independent classifier calls healthy at dose 0.",
        needs=("independent", "diseased")),
    Measure("disentanglement.swap", "swapped disease decides", SHARE, "more",
        "Share of lungs that get another image's class when they get its disease code.",
        needs=("swap",)),
)
_MAPS = (
    Measure("localisation.*.ap", "average precision", SCORE, "more",
        "Average precision of the map's pixels against the mask; a random map scores the mask's "
        "share of the image.", needs=("masks",)),
    Measure("localisation.*.auroc", "pixel AUROC", SCORE, "more",
        "The chance that a pixel in the mask scores above one outside.", needs=("masks",)),
    Measure("localisation.*.pointing", "pointing game", SHARE, "more",
        "Share of maps whose maximum lies in the mask.", needs=("masks",)),
    Measure("localisation.*.mass", "mass inside", SCORE, "more",
        "Share of the map's sum that lies in the mask.", "of the map", needs=("masks",)),
    Measure("localisation.*.iou_otsu", "IoU at Otsu's threshold", SCORE, "more",
        "Intersection over union of the mask and the map cut at Otsu's threshold.",
        needs=("masks",)),
    Measure("localisation.*.iou_tuned", "IoU at a tuned threshold", SCORE, "more",
        "The same, cut at the share of its maximum that is best on validation images.",
        needs=("masks", "tuning")),
    Measure("faithfulness.*.deletion", "deletion", SCORE, "less",
        "Mean probability while pixels are replaced by a healthy image's, the map's highest first.",
        needs=("verdict",)),
    Measure("faithfulness.*.insertion", "insertion", SCORE, "more",
        "Mean probability while pixels are put into a healthy image, the map's highest first.",
        needs=("verdict",)),
    Measure("stability.*.max_sensitivity", "change under noise", SCORE, "less",
        "Max sensitivity (Yeh et al. 2019): the largest change of the map under a noise of 0.01 of "
        "the range, over three draws, as a share of its norm.", "of the map", needs=("time",)),
    Measure("randomisation.*", "correlation, CNN randomised", CORRELATION, "less",
        "Spearman's correlation of the map with that of the CNN after all its layers are shuffled.",
        needs=("time",)),
    Measure("randomisation.*.magnitude", "correlation of magnitudes", CORRELATION, "less",
        "The same for the maps' magnitudes.", needs=("time",)),
)
_TWINS = "the exact healthy twin of a diseased phantom"
_PHANTOMS = (
    Measure("cnn.auroc", "AUROC of the CNN", AUROC, "more",
        "The chance that a diseased phantom gets a higher logit than a healthy one.",
        statistic="auroc", columns=("raw/logit", "raw/label")),
    Measure("reliance.*.drop", "fall of the logit", SCORE, "",
        "How far the logit falls when the phantom is drawn without its lesions, or its marker.",
        "logits"),
    Measure("reliance.*.flips", "verdicts that flip", SHARE, "",
        "Share of verdicts that become healthy when they are left out."),
    Measure("marker.*.mass", "mass on the marker", SCORE, "",
        "Share of the map's absolute values on the marker; `chance` is its share of the image.",
        "of the map"),
    Measure("marker.*.mass_near", "mass near the marker", SCORE, "",
        "The same within R / 32 pixels of the marker.", "of the map"),
    Measure("marker.*.share", "signed share of the marker", SCORE, "",
        "The map's sum over the marker, divided by its whole sum.", "of the map"),
    Measure("real_cnn.path_spearman", "dose and logit, judging CNN", CORRELATION, "more",
        "Spearman's correlation of dose and the judging CNN's logit along the path."),
    Measure("real_cnn.validity", "validity, judging CNN", SHARE, "more",
        "Share of counterfactuals to which the judging CNN gives another class than the image."),
    Measure("twin.*.psnr", "PSNR against the twin", SCORE, "more",
        f"PSNR of the picture against {_TWINS}.", "dB"),
    Measure("twin.*.ssim", "SSIM with the twin", SCORE, "more",
        f"SSIM of the picture and {_TWINS}."),
    Measure("dose.burden_spearman", "dose and burden", CORRELATION, "more",
        "Spearman's correlation of the dose found and the true burden.", statistic="spearman",
        columns=("raw/dose", "raw/burden")),
    Measure("dose.burden_spearman_of_logit", "logit and burden", CORRELATION, "",
        "The same of the judging CNN's logit, for comparison.", statistic="spearman",
        columns=("raw/own", "raw/burden")),
)
# fmt: on

# `cxr.phantoms.probe` reads these parameters of the structure, and the burden of disease, from a
# picture of a phantom.
STRUCTURE = ("shift_x", "shift_y", "tilt", "scale", "turn", "width", "breath", "arm")


def _swap(what: str, name: str, read: str, true: str, better: str, meaning: str) -> Measure:
    """A measure of the correlation between parameters read from pictures and their truth. read,
    true: the names of both in the rows."""
    parameters = STRUCTURE if what == "structure" else ("burden",)
    return Measure(
        key=f"swap.{what}.{name}",
        title=f"{what}, {name}",
        kind=CORRELATION,
        better=better,
        meaning=meaning,
        statistic="mean_pearson",
        columns=tuple(f"raw/{kind}_{p}" for kind in (read, true) for p in parameters),
    )


# fmt: off
_SWAPS = (
    _swap("structure", "real", "real", "true", "",
        "Structure read from a phantom, with the truth: the best that the reader can do."),
    _swap("structure", "kept", "mixed", "true", "more",
        "Structure read from A's lungs with B's disease, with A's structure."),
    _swap("structure", "leaked", "mixed", "other", "less",
        "The same with B's structure: should be 0."),
    _swap("burden", "real", "real", "true", "",
        "Burden read from a phantom, with the truth: the best that the reader can do."),
    _swap("burden", "moved", "mixed", "other", "more",
        "Burden read from A's lungs with B's disease, with B's burden."),
    _swap("burden", "leaked", "mixed", "true", "less", "The same with A's burden: should be 0."),
)
# fmt: on

EVALUATION = (
    *(*_CLASSIFIER, *_SHORTCUT, *_GENERATOR, *_RECONSTRUCTION, *_COUNTERFACTUAL),
    *(*_FINDINGS, *_GATE, *_PATH, *_DISENTANGLEMENT, *_MAPS),
)
PHANTOMS = (*_PHANTOMS, *_SWAPS)
MEASURES = {measure.key: measure for measure in (*EVALUATION, *PHANTOMS)}
COMPARED = {m.part for m in (*_MAPS, *_SHORTCUT, *_FINDINGS) if ".*" in m.key} | {"marker"}
