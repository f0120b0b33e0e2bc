"""Adapters exchanged with peft in both directions, and trained from the same start."""

import sys
import tempfile
import warnings
from pathlib import Path

import expert_files
import lora_files
import method_files
import prompt_methods
import torch
import training
from figures import Figures
from transformers.utils import logging


def main() -> int:
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    figures = Figures("torch", "peft", "transformers", "safetensors")
    with tempfile.TemporaryDirectory() as folder:
        for topic in (lora_files, method_files, expert_files, prompt_methods, training):
            if sys.argv[1:] in ([], [topic.__name__]):
                topic.compare(figures, Path(folder) / topic.__name__)
    return figures.end()


if __name__ == "__main__":
    sys.exit(main())
