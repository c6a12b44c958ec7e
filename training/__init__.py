"""Train, evaluate, compare and publish Hopfield models from recipes."""
