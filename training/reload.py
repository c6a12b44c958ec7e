"""Check that a saved folder stands alone: load it where the package cannot be imported, and compare with the logits it was saved with."""

import sys


sys.modules["modeling_uhop"] = None  # type: ignore[assignment]

import argparse  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline  # noqa: E402


TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="model folder")
    parser.add_argument("probe", help=".npz with `image_0`, `image_1`, ... (uint8) and the `logits` from before saving")
    args = parser.parse_args()
    probe = np.load(args.probe)
    images = [Image.fromarray(probe[name]) for name in probe.files if name != "logits"]
    expected = torch.from_numpy(probe["logits"])

    model = AutoModelForImageClassification.from_pretrained(args.folder, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(args.folder)
    with torch.no_grad():
        logits = model(**processor(images, return_tensors="pt")).logits
    classify = pipeline("image-classification", model=args.folder, trust_remote_code=True)
    top = [answers[0] for answers in classify(images)]

    scores, labels = expected.softmax(-1).max(-1)
    differences = {
        "AutoModelForImageClassification": (logits - expected).abs().max().item(),
        'pipeline("image-classification")': max(abs(a["score"] - s) for a, s in zip(top, scores.tolist(), strict=True)),
    }
    same_labels = all(a["label"] == model.config.id2label[k] for a, k in zip(top, labels.tolist(), strict=True))
    agree = same_labels and max(differences.values()) < TOLERANCE
    for name, difference in differences.items():
        print(f"  {name}: largest difference {difference:.1e} over {len(images)} images")
    print(f"  logits {'agree' if agree else 'DISAGREE'} (bound {TOLERANCE:g}); the package was not importable")
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
