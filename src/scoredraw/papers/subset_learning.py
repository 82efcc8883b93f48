"""What a learner makes of a subset of texts: a classifier's accuracy, a language model's surprise.

Counts are made once for a whole collection; a subset is a choice of its rows.

The language model is an interpolated Kneser-Ney bigram with discount D over the words W:

    p(w | v)  = max(c(v,w) - D, 0) / c(v) + D N(v·) / c(v) · p(w),    p(w | v) = p(w) if c(v) = 0
    p(w)      = max(N(·w) - D, 0) / N(··) + D |{w: N(·w) > 0}| / N(··) / W

N(v·) different words follow v, N(·w) precede w. Kneser and Ney 1995; Chen and Goodman 1999.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.data_selection.text_metrics import as_column, split_words

Int = NDArray[np.int64]
Float = NDArray[np.float64]

DISCOUNT = 0.75
RARE = 3  # words that come less often in the whole collection are one word


class Bigrams:
    """The bigrams of a collection: document (w,), word before (w,) and word (w,) of each place.

    `words` different words, of which 0 stands for the rare ones; number `words` opens a document.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        document, code, vocabulary = split_words(as_column(list(texts), "texts"))
        counts = np.bincount(code, minlength=len(vocabulary))
        number = np.where(counts >= RARE, np.cumsum(counts >= RARE), 0)
        self.document: Int = document
        self.word: Int = number[code]
        self.words = int(number.max(initial=0)) + 1
        first = np.diff(document, prepend=-1) != 0
        self.before: Int = np.where(first, self.words, np.roll(self.word, 1))
        self.n = len(texts)

    def of(self, rows: Int) -> tuple[Int, Int]:
        """(before, word) of the places in these documents."""
        inside = np.zeros(self.n, bool)
        inside[rows] = True
        places = inside[self.document]
        return self.before[places], self.word[places]


class BigramModel:
    """An interpolated Kneser-Ney bigram model of some documents. O(bigrams log bigrams)."""

    def __init__(self, bigrams: Bigrams, rows: Int) -> None:
        before, word = bigrams.of(rows)
        self.words = w = bigrams.words
        self.pair, self.count = np.unique(before * w + word, return_counts=True)
        first, second = self.pair // w, self.pair % w
        self.total = np.bincount(first, self.count, minlength=w + 1)
        self.followers = np.bincount(first, minlength=w + 1)
        ahead = np.bincount(second, minlength=w)
        pairs = len(self.pair)
        spread = DISCOUNT * np.count_nonzero(ahead) / pairs
        self.unigram: Float = np.maximum(ahead - DISCOUNT, 0) / pairs + spread / w

    def log_probability(self, before: Int, word: Int) -> Float:
        """log p(word | before) of each place, float64."""
        asked = before * self.words + word
        place = np.minimum(np.searchsorted(self.pair, asked), len(self.pair) - 1)
        count = np.where(self.pair[place] == asked, self.count[place], 0)
        seen = np.maximum(self.total[before], 1)
        kept = np.maximum(count - DISCOUNT, 0) / seen
        back = np.where(self.total[before] > 0, DISCOUNT * self.followers[before] / seen, 1.0)
        return np.asarray(np.log(kept + back * self.unigram[word]))


def log_likelihood(bigrams: Bigrams, train: Int, test: Int) -> float:
    """Mean log p of a word of the test documents, nats, by a model of the training documents."""
    return float(BigramModel(bigrams, train).log_probability(*bigrams.of(test)).mean())


def word_features(texts: Sequence[str]) -> Any:
    """Counts of words that are in two texts or more, sparse (n, words)."""
    from sklearn.feature_extraction.text import CountVectorizer

    return CountVectorizer(min_df=2, max_features=20_000, dtype=np.float64).fit_transform(texts)


def accuracy(counts: Any, labels: Int, train: Int, test: Int) -> float:
    """Share of test documents that logistic regression on the training documents' tf-idf gets."""
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import LogisticRegression

    weigh = TfidfTransformer(sublinear_tf=True).fit(counts[train])
    model = LogisticRegression(C=30.0, tol=1e-3, max_iter=300)
    model.fit(weigh.transform(counts[train]), labels[train])
    return float((model.predict(weigh.transform(counts[test])) == labels[test]).mean())
