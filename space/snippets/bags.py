import torch
from sklearn.datasets import load_digits

from modeling_uhop import UHopMILFeatureExtractor, UHopMILForBagClassification


folder = "space/models/bags"  # from the root of the repository; in the Space it is models/bags
model = UHopMILForBagClassification.from_pretrained(folder)
extractor = UHopMILFeatureExtractor.from_pretrained(folder)

digits = load_digits()
for chosen in ([0, 1, 2, 3, 9], [0, 1, 2, 3, 4]):
    with torch.no_grad():
        outputs = model(**extractor([digits.data[chosen] / 16], return_tensors="pt"))
    print(f"a bag of {digits.target[chosen].tolist()}: probability of a 9 inside {outputs.logits.softmax(-1)[0, 1]:.2f}")
    print("  weights of its images:", [round(weight, 2) for weight in outputs.instance_weights[0].tolist()])
