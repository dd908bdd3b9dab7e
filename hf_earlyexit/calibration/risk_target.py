"""The risk target: a loss, its largest acceptable mean, the confidence, and the method of proof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import ArrayLike

from hf_earlyexit.calibration.losses import LOSSES, Loss
from hf_earlyexit.calibration.risk_control import Calibration, are_enough, calibrate, inputs_needed, split_delta
from hf_earlyexit.common.data import Example
from hf_earlyexit.evaluation.generate_texts import Text


@dataclass(frozen=True)
class RiskTarget:
    """A guarantee: the mean loss on inputs to come is at most `target`.

    Attributes:
        target: In units of the loss: 0.02 of `"rougeL_drop"` is 2 points.
        loss: A name in `losses.LOSSES`, or an object with its attributes.
        delta: The probability, over the draw of the calibration inputs, that the guarantee fails.
        method: `"ltt"`, `"ucb"` or `"crc"`, as for `risk_control.calibrate`.
        bound: `"wsr"`, `"hb"`, `"clopper_pearson"` or `"hoeffding"`, likewise.

    Raises:
        ValueError: A value is not legal; the message names it and the remedy.
    """

    target: float
    loss: str | Loss = "text_distance"
    delta: float = 0.1
    method: str = "ltt"
    bound: str = "wsr"

    def __post_init__(self):
        if isinstance(self.loss, str):
            if self.loss not in LOSSES:
                raise ValueError(f"`loss` must be one of {list(LOSSES)} or an object, got {self.loss!r}.")
            object.__setattr__(self, "loss", LOSSES[self.loss])
        self._check_loss()
        self.inputs_needed()

    def _check_loss(self) -> None:
        lacking = [name for name in Loss.__annotations__ if not hasattr(self.loss, name)]
        if lacking or not callable(getattr(self.loss, "of", None)):
            raise ValueError(
                f"`loss` must be one of {list(LOSSES)} or an object with {[*Loss.__annotations__, 'of']}, got "
                f"{self.loss!r}."
            )
        if self.method != "crc" and self.bound == "clopper_pearson" and not self.loss.binary:
            raise ValueError(
                f"`bound='clopper_pearson'` is for losses of 0 and 1, such as 'text_mismatch', not "
                f"{self.loss.name!r}: use 'wsr' or 'hb'."
            )

    def calibrate(self, losses: ArrayLike, costs: ArrayLike, curves: int = 1, starts: int = 1) -> Calibration:
        """The columns of a curve that keep the target, if `curves` curves are tested on the same inputs."""
        return calibrate(losses, costs, **self._asked(curves, starts))

    def inputs_needed(self, curves: int = 1, starts: int = 1) -> int:
        """The smallest number of units with which any setting can be accepted."""
        return inputs_needed(**self._asked(curves, starts))

    def check(self, parts: dict[str, list[Example]], units: int, curves: int, starts: int = 1) -> None:
        """Check that the target can be shown on these inputs.

        Raises:
            ValueError: The units of the calibrate part are too few even at zero loss, or references are missing.
        """
        if self.method == "crc" and curves > 1:
            raise ValueError(f"`finalists={curves}` does not go with `method='crc'`, which has no delta to share.")
        if not are_enough(max(1, units), **self._asked(curves, starts)) or not units:
            needed = self.inputs_needed(curves, starts)
            total = sum(map(len, parts.values()))
            raise ValueError(
                f"The calibrate part has {units} units, of {total} inputs: too few for `target={self.target}` "
                f"{self._confidence(curves, starts)}even at zero loss. {needed} are needed, and more where there are "
                "losses: give more inputs, a larger share of them, or a larger target."
            )
        without = next((one for part in parts.values() for one in part if not one.references), None)
        self._try_loss()
        if self.loss.needs_references and without is not None:
            raise ValueError(
                f"`loss={self.loss.name!r}` needs references, and the input {without.source[:80]!r} has none: name "
                "their column, or use a loss against full depth, such as 'text_distance'."
            )

    def _try_loss(self) -> None:
        """Compute the loss once, so that errors in it appear before texts are generated; equal texts must lose 0."""
        text = Text("a text", [1], [1])
        if (found := self.loss.of(text, text, ["a text"])) != 0:
            raise ValueError(f"`loss={self.loss.name!r}` must be 0 where both texts are equal, got {found!r}.")

    def described(self) -> dict[str, Any]:
        """The loss, as plain values."""
        against = "references" if self.loss.needs_references else "full depth"
        names = ("name", "description", "lower", "upper")
        return {**{name: getattr(self.loss, name) for name in names}, "against": against}

    def recorded(self) -> dict[str, Any]:
        """The target and how it is shown, as plain values without the loss."""
        return {name: getattr(self, name) for name in ("target", "delta", "method", "bound")}

    def _confidence(self, curves: int, starts: int) -> str:
        if self.method == "crc":
            return ""
        each = f" over {curves} curves" if curves > 1 else ""
        each += f" from {starts} starts" if starts > 1 else ""
        return f"with `delta={self.delta}`{each} by {self.bound!r} "

    def _asked(self, curves: int, starts: int) -> dict[str, Any]:
        delta, limits = split_delta(self.delta, curves), {"loss_lower": self.loss.lower, "loss_upper": self.loss.upper}
        asked = {"target": self.target, "delta": delta, "method": self.method, "bound": self.bound}
        return {**asked, **limits, "starts": starts}


def units_of(examples: Sequence[Example], rows_per_batch: int | None) -> list[str]:
    """The unit of each input. Inputs after the last whole batch belong to none and are left out.

    Args:
        examples: In the order in which texts are generated.
        rows_per_batch: The batch size if rows of a batch wait for each other, so that a batch is one unit; else None.
    """
    if rows_per_batch is None:
        return [example.unit for example in examples]
    whole = len(examples) // rows_per_batch * rows_per_batch
    return [f"batch {place // rows_per_batch}" for place in range(whole)]


def refuse_degenerate(texts: Sequence[Text]) -> None:
    """Refuse to certify a model whose full-depth texts are all empty or all equal: no loss can occur.

    Args:
        texts: Full-depth texts of distinct inputs.

    Raises:
        ValueError: They are all empty or, for at least two inputs, all equal.
    """
    written = {one.text.strip() for one in texts}
    if written == {""} or (len(written) == 1 and len(texts) > 1):
        found = f"{next(iter(written))[:80]!r}" if written != {""} else "nothing"
        raise ValueError(
            f"At full depth the model writes {found} for each of {len(texts)} inputs, so that a promise about its "
            "texts would say nothing: see whether the tokenizer, the prefix and the inputs are those of this model."
        )
