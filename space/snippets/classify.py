import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor

from modeling_uhop import UHopViTForImageClassification


folder = "space/models/digits"  # from the root of the repository; in the Space it is models/digits
model = UHopViTForImageClassification.from_pretrained(folder, attn_implementation="eager")
processor = AutoImageProcessor.from_pretrained(folder)

digits = load_digits()
image = Image.fromarray((digits.images[7] / 16 * 255).astype(np.uint8)).convert("RGB")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"), output_attentions=True)
label = int(outputs.logits.argmax())
print(f"answer {label}, with probability {outputs.logits.softmax(-1)[0, label]:.2f}; truth {digits.target[7]}")
weights = outputs.attentions[-1][0, :, 0, 1:]  # of the CLS token over the patches, a row for each head
print("patches with weight, for each head of the last layer:", (weights > 0).sum(-1).tolist())
