"""A linear classifier of texts by words and word pairs: a baseline and a teacher for classifiers, and a discriminator.

Needs scikit-learn, which is in requirements-dev.txt. Of the scripts, only reward.py --teacher linear needs it.
"""

import numpy as np
import torch

from runtime.errors import BadInput

STRENGTH = 3.0  # inverse of the L2 regularization, C of scikit-learn; chosen on the reviews of the split prompts


class LinearClassifier:
    """Logistic regression on tf-idf weights of the words and word pairs of a text, in lower case.

    A punctuation mark is a word. Words and pairs that occur in a single training text are ignored. The result is
    deterministic. Raises BadInput if scikit-learn is not installed.
    """

    def __init__(self):
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
        except ImportError:
            raise BadInput("scikit-learn is not installed: pip install -r requirements-dev.txt") from None
        self.features = TfidfVectorizer(
            ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"[\w']+|[^\w\s]", dtype=np.float32
        )
        self.regression = LogisticRegression(C=STRENGTH, max_iter=1000)

    def fit(self, texts, labels):
        """Train on texts and their labels, 0 or 1 each. Return self."""
        self.regression.fit(self.features.fit_transform(texts), labels)
        return self

    def log_odds(self, texts):
        """Return log(p / (1 - p)) of the label 1, (len(texts),) float64, like SentimentReward.log_odds."""
        return torch.from_numpy(self.regression.decision_function(self.features.transform(texts)).astype(float))

    @property
    def parameters(self):
        """Return the number of weights, one per word or pair, and the bias."""
        return self.regression.coef_.size + 1
