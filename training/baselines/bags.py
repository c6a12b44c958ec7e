"""Baseline classifiers of bags: scikit-learn on statistics or on a kernel of bags."""

from collections.abc import Callable

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC


# A function of (training bags, their labels, evaluated bags), all standardised; it returns the
# scores of the evaluated bags.
Baseline = Callable[[list[np.ndarray], np.ndarray, list[np.ndarray]], np.ndarray]


def mean_and_logistic_regression(train_bags: list[np.ndarray], labels: np.ndarray, evaluated_bags: list[np.ndarray]) -> np.ndarray:
    """Logistic regression on the mean instance of each bag."""
    means = [np.stack([bag.mean(0) for bag in bags]) for bags in (train_bags, evaluated_bags)]
    return LogisticRegression(C=0.01, max_iter=1000).fit(means[0], labels).decision_function(means[1])


def statistics_and_random_forest(train_bags: list[np.ndarray], labels: np.ndarray, evaluated_bags: list[np.ndarray]) -> np.ndarray:
    """A random forest on the minimum, maximum, mean and standard deviation of each feature over a
    bag."""
    described = [
        np.stack([np.concatenate([bag.min(0), bag.max(0), bag.mean(0), bag.std(0)]) for bag in bags])
        for bags in (train_bags, evaluated_bags)
    ]
    forest = RandomForestClassifier(300, random_state=0).fit(described[0], labels)
    return forest.predict_proba(described[1])[:, 1] - 0.5


def set_kernel_svm(train_bags: list[np.ndarray], labels: np.ndarray, evaluated_bags: list[np.ndarray]) -> np.ndarray:
    """An SVM with the normalised set kernel (Gaertner et al., 2002): the mean RBF kernel over pairs
    of instances.

    Gamma is 1 / (features x variance) of the training instances, as scikit-learn's "scale", so that
    constant features have no effect. C is chosen from 1, 10 and 100 by cross-validation within the
    training bags."""
    bags = train_bags + evaluated_bags
    rows = np.concatenate(bags).astype(np.float64)
    starts = np.cumsum([0] + [len(bag) for bag in bags[:-1]])
    gamma = 1.0 / (rows.shape[1] * np.concatenate(train_bags).var())
    similarity = [rbf_kernel(bag.astype(np.float64), rows, gamma=gamma).mean(0) for bag in bags]
    kernel = np.stack([np.add.reduceat(row, starts) for row in similarity]) / [len(bag) for bag in bags]
    kernel /= np.sqrt(np.outer(kernel.diagonal(), kernel.diagonal()))
    count = len(train_bags)
    search = GridSearchCV(SVC(kernel="precomputed"), {"C": [1.0, 10.0, 100.0]}, scoring="roc_auc", cv=3)
    return search.fit(kernel[:count, :count], labels).decision_function(kernel[count:, :count])


BASELINES: dict[str, Baseline] = {
    "mean, logistic regression": mean_and_logistic_regression,
    "statistics, random forest": statistics_and_random_forest,
    "set kernel, SVM": set_kernel_svm,
}
