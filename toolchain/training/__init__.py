"""Training: the loop, and accuracy."""

from toolchain.training.evaluate import Accuracy, accuracy
from toolchain.training.loop import FitConfig, FitResult, Step, fit

__all__ = ["Accuracy", "FitConfig", "FitResult", "Step", "accuracy", "fit"]
