"""Which document stands for which: the outcome of looking for duplicates."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    """Each document's representative: the kept document it repeats, or itself.

    A representative always stands for itself and comes before those it stands for.

    Attributes:
        representatives: [n] int64.
        jaccard: [n] similarity with the representative; 1 for a kept document and for an exact duplicate.
    """

    representatives: NDArray[np.int64]
    jaccard: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.representatives)

    @classmethod
    def alone(cls, size: int) -> "Clusters":
        """Every document stands for itself."""
        return cls(representatives=np.arange(size), jaccard=np.ones(size))

    @property
    def is_kept(self) -> NDArray[np.bool_]:
        """[n] whether the document stands for itself."""
        return self.representatives == np.arange(len(self))

    @property
    def kept(self) -> NDArray[np.int64]:
        """Indices of the kept documents, ascending."""
        return np.flatnonzero(self.is_kept)

    def removed(self) -> Iterator[tuple[int, int, float]]:
        """(document, representative, Jaccard similarity) of each removed document: the cluster map."""
        for document in np.flatnonzero(~self.is_kept):
            representative = int(self.representatives[document])
            yield int(document), representative, float(self.jaccard[document])

    def then(self, later: "Clusters", numbers: NDArray[np.int64]) -> "Clusters":
        """These clusters after another search among documents they kept.

        Args:
            later: clusters of those documents. Where a representative goes, the documents it stood for take its
                representative, and its similarity with it.
            numbers: [len(later)] their numbers here, ascending; all numbers where `later` left out the others itself.
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
