"""A small gridworld: a Markov decision process whose exact values are known.

    S . . .      S start, G goal (reward +1), X pit (reward -1), # wall
    . # . X      every step costs a little, so that short paths are better
    . . . G

An action succeeds with probability 1 - `slip`; otherwise the agent moves at a right angle, to
either side with the same probability (Russell & Norvig, Artificial Intelligence, chapter 17; Sutton
& Barto 2018, chapter 4). A move into a wall or the border leaves the agent where it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from easyllm.core.errors import ConfigError

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
ARROWS = "↑→↓←"
"""Up, right, down, left: the order of the actions."""
DEFAULT_GRID = ("S...", ".#.X", "...G")
CELLS = "S.GX#"


@dataclass(frozen=True, slots=True)
class MarkovDecisionProcess:
    """A finite Markov decision process with S states and A actions.

    Attributes:
        transitions: [S, A, S] fp64, probability of the next state.
        rewards: [S, A, S] fp64, reward of a transition.
        terminal: [S] bool; a terminal state has the value 0 and no further rewards.
        discount: γ.
        start: the state in which episodes start.
    """

    transitions: Tensor
    rewards: Tensor
    terminal: Tensor
    discount: float
    start: int

    @property
    def num_states(self) -> int:
        """S."""
        return self.transitions.shape[0]

    def expected_rewards(self) -> Tensor:
        """Returns the expected reward of each state and action, [S, A]."""
        return (self.transitions * self.rewards).sum(-1)

    def action_values(self, values: Tensor) -> Tensor:
        """Returns Q(s, a) = r(s, a) + γ Σ p(s'|s, a) V(s'), [S, A]; 0 in terminal states.

        Args:
            values: [S], the values of the states.
        """
        found = self.expected_rewards() + self.discount * (self.transitions @ values)
        return found.masked_fill(self.terminal[:, None], 0.0)


@dataclass(frozen=True, slots=True)
class Gridworld:
    """A grid of cells, and the decision process on its free cells.

    Attributes:
        rows: the cells, one string per row.
        states: the number of each free cell's state, by (row, column).
        process: the decision process.
    """

    rows: tuple[str, ...]
    states: dict[tuple[int, int], int]
    process: MarkovDecisionProcess

    def show_values(self, values: Tensor) -> list[str]:
        """Returns the values [S] as one line of text per row of the grid."""
        return self._lines(lambda state: f"{float(values[state]):6.2f}", width=6)

    def show_policy(self, policy: Tensor) -> list[str]:
        """Returns the actions [S] as arrows, one line per row of the grid."""
        terminal = self.process.terminal
        return self._lines(
            lambda state: "*" if terminal[state] else ARROWS[int(policy[state])], width=1
        )

    def _lines(self, text: Callable[[int], str], width: int) -> list[str]:
        lines = []
        for row, cells in enumerate(self.rows):
            shown = (
                text(self.states[row, column]) if (row, column) in self.states else "#" * width
                for column in range(len(cells))
            )
            lines.append(" ".join(shown))
        return lines


def build_gridworld(
    rows: Sequence[str] = DEFAULT_GRID,
    *,
    slip: float = 0.2,
    step_reward: float = -0.04,
    discount: float = 0.95,
) -> Gridworld:
    """Returns a gridworld.

    Args:
        rows: the cells, with one `S`, at least one `G`, and any of `.`, `X` and `#`.
        slip: probability of moving at a right angle to the action.
        step_reward: reward of a step that does not end in `G` (+1) or `X` (-1).
        discount: γ, below 1 unless every policy reaches a terminal cell.

    Raises:
        ConfigError: the grid has rows of different lengths, an unknown cell, no goal or not exactly
            one start.
    """
    text = "".join(rows)
    if len({len(row) for row in rows}) != 1 or set(text) - set(CELLS):
        raise ConfigError(f"a grid has rows of one length of the cells {CELLS}, got {list(rows)}")
    if text.count("S") != 1 or "G" not in text:
        raise ConfigError(f"a grid has one start S and a goal G, got {list(rows)}; add them")
    free = [(r, c) for r, row in enumerate(rows) for c, cell in enumerate(row) if cell != "#"]
    states = {cell: number for number, cell in enumerate(free)}
    count = len(free)
    transitions = torch.zeros(count, len(MOVES), count, dtype=torch.float64)
    rewards = torch.full_like(transitions, step_reward)
    terminal = torch.tensor([rows[r][c] in "GX" for r, c in free])
    for (row, column), state in states.items():
        end = {"G": 1.0, "X": -1.0}.get(rows[row][column])
        if end is not None:
            rewards[:, :, state] = end
        for action in range(len(MOVES)):
            for turn, probability in ((0, 1 - slip), (1, slip / 2), (3, slip / 2)):
                down, right = MOVES[(action + turn) % len(MOVES)]
                reached = states.get((row + down, column + right), state)
                if terminal[state]:
                    reached = state
                transitions[state, action, reached] += probability
    start = states[next((r, c) for r, c in free if rows[r][c] == "S")]
    process = MarkovDecisionProcess(transitions, rewards, terminal, discount, start)
    return Gridworld(tuple(rows), states, process)


__all__ = ["DEFAULT_GRID", "Gridworld", "MarkovDecisionProcess", "build_gridworld"]
