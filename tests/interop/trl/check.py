"""Losses and gradients of preference objectives, equal to TRL's on the same tensors."""

import sys
import tempfile
import warnings
from pathlib import Path

import datasets
import losses
import torch
from figures import Figures
from transformers.utils import logging


def main() -> int:
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    figures = Figures("torch", "trl", "transformers", "peft")
    with tempfile.TemporaryDirectory() as folder:
        losses.compare(figures, Path(folder))
    return figures.end()


if __name__ == "__main__":
    sys.exit(main())
