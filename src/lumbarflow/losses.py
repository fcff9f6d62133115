"""The combined loss of Ahmed et al. 2024 and the metric that chooses the best epoch; importing this imports Keras.

Both take sparse targets: integer classes (n, H, W) beside probabilities (n, H, W, classes).
"""

from __future__ import annotations

from lumbarflow.backend import load_keras

keras = load_keras()
ops = keras.ops

# Probabilities are kept this far from 0 and 1: the nearest step that float32 resolves below 1, so that the logarithm
# and the gradient of (1 - p) ** gamma stay finite.
EPSILON = 1e-7
DICE_OVER = ("pooled", "classes")


@keras.saving.register_keras_serializable("lumbarflow")
class FocalDiceLoss(keras.losses.Loss):
    """alpha * focal + (1 - alpha) * (1 - soft Dice), computed in float32.

    With p the probability of a pixel's true class:

    - focal: mean over the batch's pixels of -(1 - p) ** gamma * log(p). gamma 0 makes it the cross-entropy.
    - soft Dice, `dice_over="pooled"`: (2 * sum p + smooth) / (2 * pixels + smooth), sums over the batch's pixels and
      classes together as in the authors' code. (Both the one-hot targets and the probabilities sum to 1 in each
      pixel, so this is the mean of p, all but the smoothing: large classes weigh as much as they have pixels.)
    - soft Dice, `dice_over="classes"`: the same ratio for each class, then the mean over classes: small classes weigh
      as much as large ones. A class that is neither in the targets nor predicted has Dice 1 through `smooth`.

    Args:
        gamma: focusing exponent, at least 0.
        alpha: weight of the focal part, in [0, 1].
        smooth: added to numerator and denominator of the Dice, in pixels, above 0.
        dice_over: "pooled" or "classes".
    Call:
        y_true: integers (n, H, W), classes 0 .. classes - 1.
        y_pred: probabilities (n, H, W, classes).
    Source: arXiv 2409.06018, section on the loss (gamma 4, alpha 0.6); its code has alpha 0.7.
    """

    def __init__(
        self,
        gamma: float = 4.0,
        alpha: float = 0.6,
        smooth: float = 1.0,
        dice_over: str = "pooled",
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
        super().__init__(name=name, **kwargs)
        self.gamma, self.alpha, self.smooth, self.dice_over = float(gamma), float(alpha), float(smooth), dice_over

    def call(self, y_true, y_pred):
        y_true = ops.cast(y_true, "int32")
        y_pred = ops.cast(y_pred, "float32")
        p = ops.squeeze(ops.take_along_axis(y_pred, ops.expand_dims(y_true, -1), axis=-1), -1)
        dice = self._pooled_dice(p, y_pred) if self.dice_over == "pooled" else self._class_dice(y_true, y_pred)
        return self.alpha * self._focal(p) + (1 - self.alpha) * (1 - dice)

    def get_config(self):
        own = {"gamma": self.gamma, "alpha": self.alpha, "smooth": self.smooth, "dice_over": self.dice_over}
        return {**super().get_config(), **own}

    def _focal(self, p):
        p = ops.clip(p, EPSILON, 1 - EPSILON)
        return ops.mean(-ops.power(1 - p, self.gamma) * ops.log(p))

    def _pooled_dice(self, p, y_pred):
        pixels = ops.sum(ops.ones_like(p))
        return (2 * ops.sum(p) + self.smooth) / (pixels + ops.sum(y_pred) + self.smooth)

    def _class_dice(self, y_true, y_pred):
        pixel_axes = tuple(range(len(y_pred.shape) - 1))
        targets = ops.one_hot(y_true, y_pred.shape[-1], dtype="float32")
        shared = ops.sum(targets * y_pred, pixel_axes)
        total = ops.sum(targets, pixel_axes) + ops.sum(y_pred, pixel_axes)
        return ops.mean((2 * shared + self.smooth) / (total + self.smooth))


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
