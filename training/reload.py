"""Check that a saved folder stands alone: load it where the package cannot be imported, and compare with the logits it was saved with."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
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


def check_reload(folder: Path, task: str, inputs: list[np.ndarray], logits: np.ndarray) -> None:
    """Reload the folder in a fresh process, and compare.

    Args:
        folder: Saved model and processor.
        task: Key of `LOADERS`.
        inputs: Images (height, width, 3), uint8; or bags (instances, features).
        logits: What the model gave for them before it was saved, (inputs, labels).

    Raises:
        RuntimeError: If the reloaded logits differ, or it does not load.
    """
    probe = folder / "probe.npz"
    arrays: dict[str, Any] = {f"input_{index}": array for index, array in enumerate(inputs)}
    np.savez(probe, logits=logits, **arrays)
    print(f"\nReloading {folder} in a fresh process:", flush=True)
    finished = subprocess.run([sys.executable, __file__, task, str(folder), str(probe)])
    probe.unlink()
    if finished.returncode != 0:
        raise RuntimeError(f"the model saved in {folder} does not reload to the same logits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=LOADERS)
    parser.add_argument("folder", help="model folder")
    parser.add_argument("probe", help=".npz with `input_0`, `input_1`, ... and the `logits` from before saving")
    args = parser.parse_args()
    probe = np.load(args.probe)
    inputs = [probe[name] for name in probe.files if name != "logits"]
    if args.task == "image-classification":
        inputs = [Image.fromarray(array) for array in inputs]
    expected = torch.from_numpy(probe["logits"])

    sys.modules["modeling_uhop"] = None  # type: ignore[assignment]
    model_class, processor_class = LOADERS[args.task]
    model = model_class.from_pretrained(args.folder, trust_remote_code=True)
    processor = processor_class.from_pretrained(args.folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(**processor(inputs, return_tensors="pt")).logits
    classify = pipeline(args.task, model=args.folder, trust_remote_code=True)
    answers = [answer[0] if isinstance(answer, list) else answer for answer in classify(inputs)]

    scores, labels = expected.softmax(-1).max(-1)
    differences = {
        model_class.__name__: (logits - expected).abs().max().item(),
        f'pipeline("{args.task}")': max(abs(a["score"] - s) for a, s in zip(answers, scores.tolist(), strict=True)),
    }
    same_labels = all(a["label"] == model.config.id2label[k] for a, k in zip(answers, labels.tolist(), strict=True))
    agree = same_labels and max(differences.values()) < TOLERANCE
    for name, difference in differences.items():
        print(f"  {name}: largest difference {difference:.1e} over {len(inputs)} inputs")
    print(f"  logits {'agree' if agree else 'DISAGREE'} (bound {TOLERANCE:g}); the package was not importable")
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
