"""Train and evaluate a model from a recipe: the same as `modeling-uhop train`.

python training/train.py configs/vit_digits.yaml
"""

import sys

from modeling_uhop.training.cli import main


if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
