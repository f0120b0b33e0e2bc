"""A runner without a model, for tests of the scheduler and the KV cache.

It caches for each token a hash of the token and of what is cached before it; the next token is a
hash of the pages it reads. A page that leaks, is shared wrongly, copied too late or overwritten by
another sequence changes a token immediately.
"""

import zlib

import torch

VOCAB = 23


def cell(before, token):
    """Returns the cached value of a token, given the previous cell (0 if none may be seen)."""
    return zlib.crc32(b"%d %d" % (before, token))


def next_token(read, index=0):
    """Returns the token after the cached cells; `index` adds a completion's own randomness."""
    return (zlib.crc32(repr(read).encode()) + index) % VOCAB


def tokens_alone(prompt, count, *, window=None, index=0):
    """Returns the tokens that a request must generate, whatever else is being served."""
    tokens, cells = list(prompt), []
    while len(tokens) < len(prompt) + count:
        for token in tokens[len(cells) :]:
            cells.append(cell(cells[-1] if cells and window != 1 else 0, token))
        tokens.append(next_token(cells[-window:] if window else cells, index))
    return tokens[len(prompt) :]


class HashRunner:
    """Pages of cells; None where nothing has been written."""

    def __init__(self, num_pages, page_size, window=None):
        self.cells = [[None] * page_size for _ in range(num_pages)]
        self.page_size, self.window = page_size, window

    def read(self, step):
        """Returns the cells that the query of each requested row sees, read from the pages."""
        for to, copied in [(to, list(self.cells[of])) for to, of in step.copies.items()]:
            self.cells[to] = copied
        for piece in step.pieces:
            for position, token in enumerate(piece.token_ids, start=piece.start):
                before = self._at(piece, position - 1) if position and self.window != 1 else 0
                page = self.cells[piece.pages[position // self.page_size]]
                page[position % self.page_size] = cell(before, token)
        rows = []
        for piece in step.pieces:
            end = piece.start + len(piece.token_ids)
            for length in range(end - piece.num_logit_rows + 1, end + 1):
                first = max(0, length - self.window) if self.window else 0
                rows.append([self._at(piece, i) for i in range(first, length)])
        return rows

    def _at(self, piece, position):
        return self.cells[piece.pages[position // self.page_size]][position % self.page_size]

    def run(self, step):
        """Returns the next tokens as logits [N, V]."""
        rows = [next_token(read) for read in self.read(step)]
        logits = torch.zeros(len(rows), VOCAB)
        logits[torch.arange(len(rows)), rows] = 9.0
        return logits
