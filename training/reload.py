"""Check that a saved model folder works without this package.

The model is loaded in a process that cannot import the package. Its outputs are compared with those
from before saving."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    pipeline,
)


TOLERANCE = 1e-4
LOADERS: dict[str, tuple[Any, Any]] = {
    "image-classification": (AutoModelForImageClassification, AutoImageProcessor),
    "multiple-instance-classification": (AutoModelForSequenceClassification, AutoFeatureExtractor),
}


def check_reload(folder: Path, task: str | None, inputs: list[np.ndarray] | dict[str, np.ndarray], answers: np.ndarray) -> None:
    """Reload a model folder in a new process and compare its outputs with those from before saving.

    Args:
        folder: Saved model and processor.
        task: Key of `LOADERS`: the pipeline that is checked with the model and its processor.
            `None` for a model alone.
        inputs: What the processor takes: images (height, width, 3), uint8; bags (instances,
            features). For a model alone, items of its main input, all of one shape, or a batch of
            each of its inputs by name.
        answers: Outputs of the model before it was saved, such as logits (inputs, labels). For a
            model alone, its first output.

    Raises:
        RuntimeError: If the model cannot be loaded, or its outputs differ.
    """
    probe = folder / "probe.npz"
    arrays: dict[str, Any] = inputs if isinstance(inputs, dict) else {f"input_{index}": array for index, array in enumerate(inputs)}
    np.savez(probe, answers=answers, **arrays)
    print(f"\nReloading {folder} in a fresh process:", flush=True)
    finished = subprocess.run([sys.executable, __file__, str(folder), str(probe), *([] if task is None else [task])])
    probe.unlink()
    if finished.returncode != 0:
        raise RuntimeError(f"the model saved in {folder} cannot be loaded, or its outputs differ; see the lines above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="model folder")
    parser.add_argument("probe", help=".npz with `input_0`, `input_1`, ... or inputs by name, and the `answers` from before saving")
    parser.add_argument("task", nargs="?", choices=LOADERS)
    args = parser.parse_args()
    probe = np.load(args.probe)
    named = {name: probe[name] for name in probe.files if name != "answers"}
    inputs = list(named.values())
    expected = torch.from_numpy(probe["answers"])
    sys.modules["modeling_uhop"] = None  # type: ignore[assignment]
    differences = compare_outputs(args.folder, named, expected) if args.task is None else compare(args, inputs, expected)
    agree = max(differences.values()) < TOLERANCE
    for name, difference in differences.items():
        print(f"  {name}: largest difference {difference:.1e} over {len(expected)} inputs")
    print(f"  answers {'agree' if agree else 'DISAGREE'} (bound {TOLERANCE:g}); the package was not importable")
    sys.exit(0 if agree else 1)


@torch.no_grad()
def compare(args: argparse.Namespace, inputs: list[Any], expected: torch.Tensor) -> dict[str, float]:
    """Largest differences of a classifier's logits and of its pipeline's scores; infinite if a
    label differs."""
    if args.task == "image-classification":
        inputs = [Image.fromarray(array) for array in inputs]
    model_class, processor_class = LOADERS[args.task]
    model = model_class.from_pretrained(args.folder, trust_remote_code=True)
    processor = processor_class.from_pretrained(args.folder, trust_remote_code=True)
    logits = model(**processor(inputs, return_tensors="pt")).logits
    classify = pipeline(args.task, model=args.folder, trust_remote_code=True)
    answers = [answer[0] if isinstance(answer, list) else answer for answer in classify(inputs)]
    scores, labels = expected.softmax(-1).max(-1)
    same_labels = all(a["label"] == model.config.id2label[k] for a, k in zip(answers, labels.tolist(), strict=True))
    difference = max(abs(a["score"] - s) for a, s in zip(answers, scores.tolist(), strict=True))
    return {
        model_class.__name__: (logits - expected).abs().max().item(),
        f'pipeline("{args.task}")': difference if same_labels else float("inf"),
    }


@torch.no_grad()
def compare_outputs(folder: str, inputs: dict[str, np.ndarray], expected: torch.Tensor) -> dict[str, float]:
    """The largest difference of a model's first output.

    The model is loaded with the last auto class that its configuration names: the one of its head."""
    auto_class = list(AutoConfig.from_pretrained(folder, trust_remote_code=True).auto_map)[-1]
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    if model.main_input_name not in inputs:
        inputs = {model.main_input_name: np.stack(list(inputs.values()))}
    (outputs, *_) = model(**{name: torch.from_numpy(values) for name, values in inputs.items()}).to_tuple()
    return {auto_class: (outputs - expected).abs().max().item()}


if __name__ == "__main__":
    main()
