"""Duplicate clusters: the representative of each document."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    """The representative of each document: the kept document that it duplicates, or itself.

    A representative is its own representative and precedes the other documents of its cluster.

    Attributes:
        representatives: [n] int64, index of the representative of each document.
        jaccard: [n] float64, Jaccard similarity with the representative; 1 for a kept document and
            for an exact duplicate.
    """

    representatives: NDArray[np.int64]
    jaccard: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.representatives)

    @classmethod
    def alone(cls, size: int) -> "Clusters":
        """Returns `size` clusters of one document each."""
        return cls(representatives=np.arange(size), jaccard=np.ones(size))

    @property
    def is_kept(self) -> NDArray[np.bool_]:
        """[n] whether the document is its own representative."""
        kept: NDArray[np.bool_] = self.representatives == np.arange(len(self))
        return kept

    @property
    def kept(self) -> NDArray[np.int64]:
        """Indices of the kept documents, ascending."""
        return np.flatnonzero(self.is_kept)

    def removed(self) -> Iterator[tuple[int, int, float]]:
        """Yields (document, representative, Jaccard similarity) of each removed document."""
        for document in np.flatnonzero(~self.is_kept):
            representative = int(self.representatives[document])
            yield int(document), representative, float(self.jaccard[document])

    def then(self, later: "Clusters", numbers: NDArray[np.int64]) -> "Clusters":
        """Returns these clusters merged with those of a later step on the documents kept so far.

        Args:
            later: clusters of those documents. If a representative is removed there, the documents
                of its cluster get its representative and its similarity with that.
            numbers: [len(later)] indices of those documents here, ascending; all indices if `later`
                covers all documents.
        """
        representatives, jaccard = np.arange(len(self)), np.ones(len(self))
        representatives[numbers] = numbers[later.representatives]
        jaccard[numbers] = later.jaccard
        follows = representatives[self.representatives]
        return Clusters(
            representatives=follows,
            jaccard=np.where(
                follows == self.representatives, self.jaccard, jaccard[self.representatives]
            ),
        )
