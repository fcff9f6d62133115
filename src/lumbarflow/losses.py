"""The combined loss of Ahmed et al. 2024 and the metric that chooses the best epoch; importing this imports Keras.

Both take sparse targets: integer classes (n, H, W) beside probabilities (n, H, W, classes).
"""

from __future__ import annotations

from lumbarflow.backend import load_keras, sum_over_replicas
from lumbarflow.training_settings import LOSS

keras = load_keras()
ops = keras.ops

# Probabilities are kept this far from 0 and 1: the nearest step that float32 resolves below 1, so that the logarithm
# and the gradient of (1 - p) ** gamma stay finite.
EPSILON = 1e-7
DICE_OVER = ("pooled", "classes")
# Up to this exponent multiplying is faster than the general power, which costs a logarithm and an exponential.
LARGEST_MULTIPLIED_POWER = 8


@keras.saving.register_keras_serializable("lumbarflow")
class FocalDiceLoss(keras.losses.Loss):
    """alpha * focal + (1 - alpha) * (1 - soft Dice) + boundary_weight * boundary, computed in float32.

    With p the probability of a pixel's true class:

    - focal: mean over the batch's pixels of -(1 - p) ** gamma * log(p). gamma 0 makes it the cross-entropy.
    - soft Dice, `dice_over="pooled"`: (2 * sum p + smooth) / (2 * pixels + smooth), sums over the batch's pixels and
      classes together as in the authors' code. (Both the one-hot targets and the probabilities sum to 1 in each
      pixel, so this is the mean of p, all but the smoothing: large classes weigh as much as they have pixels.)
    - soft Dice, `dice_over="classes"`: the same ratio for each class, then the mean over classes: small classes weigh
      as much as large ones. A class that is neither in the targets nor predicted has Dice 1 through `smooth`.
    - boundary: mean of -log(p) over the pixels near another class of the targets; 0 for a batch without any. It is
      added to the others and takes nothing from them: alpha shares out the first two only.

    With `missed_weight` w the soft Dice becomes the Tversky index: TP = sum p of a class, FP what is predicted of it
    elsewhere, FN what its pixels lack, and

        (2 TP + smooth) / (2 TP + 2 (1 - w) FP + 2 w FN + smooth),

    which is the Dice at 0.5. Above 0.5 a missed pixel costs more than one too many. (Pooled over classes it changes
    nothing: what one class misses, another has too much, so FP = FN.)

    Predictions may be coarser than the targets by a whole stride s, as those of deep supervision are. The targets are
    then read at row and column s // 2 of each s x s block: its centre for odd s, of an even s's four pixels around the
    centre the last. They are not averaged, since the mean of classes 1 and 3 is not half a vertebra and half a disc
    but the canal. `boundary_width` counts pixels of the coarse grid then.

    All sums run over the whole batch, on several devices too, so each replica returns the loss of the global batch.

    Args:
        gamma: focusing exponent, at least 0.
        alpha: weight of the focal part, in [0, 1].
        smooth: added to numerator and denominator of the Dice, in pixels, above 0.
        dice_over: "pooled" or "classes".
        missed_weight: w of the Tversky index, between 0 and 1.
        boundary_weight: of the boundary part, at least 0.
        boundary_width: how near a pixel of another class has to be, in pixels along rows and columns (diagonals count
            as one step), a whole number from 1.
    Call:
        y_true: integers (n, H, W), classes 0 .. classes - 1.
        y_pred: probabilities (n, H, W, classes), or (n, H / s, W / s, classes).
    Raises:
        ValueError: a setting out of range; when called, targets and predictions whose sizes no whole stride relates.
    Source: arXiv 2409.06018, section on the loss (gamma 4, alpha 0.6); its code has alpha 0.7. Tversky: Salehi et al.
    2017, arXiv 1706.05721, whose beta is `missed_weight` and alpha 1 - beta. The boundary part is a plain form of the
    weights that Ronneberger et al. 2015, arXiv 1505.04597, give to borders.
    """

    def __init__(
        self,
        gamma: float = 4.0,
        alpha: float = 0.6,
        smooth: float = 1.0,
        dice_over: str = "pooled",
        missed_weight: float = 0.5,
        boundary_weight: float = 0.0,
        boundary_width: int = 2,
        name: str = "focal_dice",
        **kwargs,
    ):
        if gamma < 0:
            raise ValueError(f"loss.gamma is {gamma}; expected 0 or more.")
        if not 0 <= alpha <= 1:
            raise ValueError(f"loss.alpha is {alpha}; expected a weight from 0 (Dice only) to 1 (focal only).")
        if smooth <= 0:
            raise ValueError(f"loss.smooth is {smooth}; expected more than 0, or the Dice of an absent class is 0/0.")
        if dice_over not in DICE_OVER:
            raise ValueError(f"loss.dice_over is {dice_over!r}; expected one of {list(DICE_OVER)}.")
        if not 0 < missed_weight < 1:
            raise ValueError(f"loss.missed_weight is {missed_weight}; expected a weight between 0 and 1, 0.5 for Dice.")
        if not boundary_weight >= 0:
            raise ValueError(f"loss.boundary_weight is {boundary_weight}; expected 0 (no boundary part) or more.")
        if boundary_width < 1 or boundary_width != int(boundary_width):
            raise ValueError(f"loss.boundary_width is {boundary_width}; expected a whole number of pixels from 1.")
        super().__init__(name=name, **kwargs)
        self.gamma, self.alpha, self.smooth, self.dice_over = float(gamma), float(alpha), float(smooth), dice_over
        self.missed_weight = float(missed_weight)
        self.boundary_weight, self.boundary_width = float(boundary_weight), int(boundary_width)

    def call(self, y_true, y_pred):
        y_pred = ops.cast(y_pred, "float32")
        y_true = _at_resolution_of(y_pred, y_true)
        targets = ops.one_hot(ops.cast(y_true, "int32"), y_pred.shape[-1], dtype="float32")
        # One product for p and for the Dice of classes: faster than to gather p, above all in the gradient.
        of_true_class = targets * y_pred
        p = ops.sum(of_true_class, -1)
        clipped = ops.clip(p, EPSILON, 1 - EPSILON)
        cross_entropy = -ops.log(clipped)
        pixels = ops.sum(ops.ones_like(p))
        sums = [ops.sum(_power(1 - clipped, self.gamma) * cross_entropy), pixels]
        if self.dice_over == "pooled":
            sums += [ops.sum(p), pixels, ops.sum(y_pred)]
        else:
            sums += [ops.sum(x, (0, 1, 2)) for x in (of_true_class, targets, y_pred)]
        if self.boundary_weight:
            near = ops.cast(_near_another_class(y_true, self.boundary_width), "float32")
            sums += [ops.sum(near * cross_entropy), ops.sum(near)]
        focal, pixels, shared, true, predicted, *boundary = sum_over_replicas(sums)
        # 2 TP + 2 (1 - w) FP + 2 w FN, where FP = predicted - TP and FN = true - TP.
        size = 2 * (1 - self.missed_weight) * predicted + 2 * self.missed_weight * true
        dice = ops.mean((2 * shared + self.smooth) / (size + self.smooth))
        loss = self.alpha * focal / pixels + (1 - self.alpha) * (1 - dice)
        if boundary:
            near_cross_entropy, near_pixels = boundary
            loss += self.boundary_weight * near_cross_entropy / ops.maximum(near_pixels, 1)
        # As an array of one: Keras shares it out between TensorFlow's replicas, whose gradients it adds up, and leaves
        # scalars whole.
        return ops.reshape(loss, (1,))

    def get_config(self):
        return {**super().get_config(), **{name: getattr(self, name) for name in LOSS}}


def _at_resolution_of(y_pred, y_true):
    """The targets (n, H, W) read once in each block that a pixel of the predictions (n, h, w, classes) stands for."""
    fine, coarse = tuple(y_true.shape[1:3]), tuple(y_pred.shape[1:3])
    # Sizes that are unknown while the graph is traced are taken to be equal.
    if fine == coarse or None in (*fine, *coarse):
        return y_true
    stride = fine[0] // coarse[0]
    if stride < 1 or fine != (stride * coarse[0], stride * coarse[1]):
        raise ValueError(
            f"loss: targets of size {list(fine)} beside predictions of size {list(coarse)}; expected the same whole "
            "stride along rows and columns. Set preprocess.size to multiples of the strides of the net's outputs."
        )
    return y_true[:, stride // 2 :: stride, stride // 2 :: stride]


def _near_another_class(y_true, width: int):
    """bool (n, H, W): another class of y_true lies within `width` rows and columns; beyond the edge there is none."""
    y_true = ops.cast(y_true, "float32")

    def greatest_along_rows(x):
        # Columns stand as channels, which are pooled many at a time: with one channel and a square window it took 20
        # times as long on a CPU.
        return ops.max_pool(x, 2 * width + 1, strides=1, padding="same", data_format="channels_last")

    def greatest_around(x):
        return greatest_along_rows(ops.transpose(greatest_along_rows(x), (0, 2, 1)))

    # A pixel belongs to its own neighbourhood, so that holds another class where its classes differ at all. (Numbers
    # are transposed, not truth values: of those TensorFlow complains on standard error where a CPU has no AVX-512.)
    difference = greatest_around(y_true) + greatest_around(-y_true)
    return ops.transpose(difference, (0, 2, 1)) > 0


def _power(x, exponent: float):
    """x ** exponent, by multiplication where the exponent is a small whole number."""
    if exponent not in range(1, LARGEST_MULTIPLIED_POWER + 1):
        return ops.power(x, exponent)
    if exponent == 1:
        return x
    root = _power(x, exponent // 2)
    return root * root * x if exponent % 2 else root * root


@keras.saving.register_keras_serializable("lumbarflow")
class MeanIoU(keras.metrics.MeanIoU):
    """Mean IoU of the classes, from one confusion matrix pooled over all batches since the last reset.

    Keras's own metric, told once that targets are sparse and predictions are probabilities. A class that is neither in
    the targets nor predicted is left out of the mean.

    Args:
        classes: how many.
    """

    def __init__(self, classes: int, name: str = "mean_iou", **kwargs):
        super().__init__(num_classes=classes, sparse_y_true=True, sparse_y_pred=False, name=name, **kwargs)

    def get_config(self):
        return {"classes": self.num_classes, "name": self.name, "dtype": self.dtype}
