"""How near generated images are to held-out ones."""

from typing import NamedTuple

import numpy as np
import scipy.linalg
from sklearn.neural_network import MLPClassifier

#: Principal components in which distances are measured; hidden units of the classifier.
COMPONENTS, HIDDEN = 50, (128, 64)


class Judge(NamedTuple):
    """Principal components of the training images, and a classifier of their labels on these, if there are labels."""

    mean: np.ndarray
    components: np.ndarray
    scale: float
    classifier: MLPClassifier | None

    def project(self, images: np.ndarray) -> np.ndarray:
        """``[n, 50]`` of images on the scale from −1 to 1."""
        return (images.reshape(len(images), -1) - self.mean) @ self.components.T

    def features(self, images: np.ndarray) -> np.ndarray:
        """The classifier's last hidden layer."""
        x = self.project(images) / self.scale
        for weights, bias in list(zip(self.classifier.coefs_, self.classifier.intercepts_, strict=True))[:-1]:
            x = np.maximum(x @ weights + bias, 0)
        return x

    def distances(self, images: np.ndarray, real: np.ndarray) -> dict[str, float]:
        """Fréchet distances between two sets of images."""
        found = {"components": frechet(self.project(images), self.project(real))}
        if self.classifier is not None:
            found["features"] = frechet(self.features(images), self.features(real))
        return found


def train_judge(images: np.ndarray, labels: np.ndarray | None) -> Judge:
    """A judge from training images on the scale from −1 to 1."""
    flat = images.reshape(len(images), -1)
    mean = flat.mean(0)
    values, vectors = np.linalg.eigh(np.cov((flat - mean).T))
    judge = Judge(mean, vectors[:, -COMPONENTS:].T, float(np.sqrt(values[-1])), None)
    if labels is None:
        return judge
    classifier = MLPClassifier(HIDDEN, max_iter=30, early_stopping=True, random_state=0)
    return judge._replace(classifier=classifier.fit(judge.project(images) / judge.scale, labels))


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """The squared 2-Wasserstein distance of the normal laws with the moments of two samples (Heusel et al., 2017).

    The trace of the root of a product of covariances is the sum of the roots of its eigenvalues, which are those of a
    symmetric matrix.
    """
    (mean_x, cov_x), (mean_y, cov_y) = ((a.mean(0, dtype=np.float64), np.cov(a.T.astype(np.float64))) for a in (x, y))
    values, vectors = scipy.linalg.eigh(cov_x)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.maximum(scipy.linalg.eigvalsh(root @ cov_y @ root), 0)
    both = np.trace(cov_x) + np.trace(cov_y) - 2 * np.sqrt(product).sum()
    return float(((mean_x - mean_y) ** 2).sum() + both)
