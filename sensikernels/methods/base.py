"""What a method is: hooks around the steps of a fine-tuning run, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sensikernels._core.errors import UsageError
from sensikernels.masks.budget import Budget
from sensikernels.masks.plans import Plan
from sensikernels.masks.scores import Scores
from sensikernels.masks.step_costs import StepCosts

Batch = Mapping[str, Tensor]
Batches = Iterable[Batch]
Gradients = Callable[[nn.Module], Callable[[Batch], object]]
"""From a model, a function that takes the gradients of a batch."""


def own_gradients(model: nn.Module) -> Callable[[Batch], object]:
    """Those of one process."""
    forward: Callable[..., Any] = model
    return lambda batch: forward(**batch).loss.backward()


@dataclass(kw_only=True, eq=False)
class Run:
    """A fine-tuning run as a method sees it.

    ``step`` counts finished optimizer steps; ``batches()`` yields training batches for ranking,
    the same ones at every call; ``sequence_length`` is their padded mean weighted by tokens
    (Σ B·S² / Σ B·S), ``tokens_per_sequence`` the plain one (Σ B·S / Σ B; None: the same), and
    ``attended`` the share of their tokens that a packed model attends to (the rest rounds up).
    ``make_optimizer`` gives a copy of the model an optimizer like the run's, to time steps for a
    ``step_time`` budget; ``costs`` were measured earlier (None: measured when needed).
    ``compute_loss``: of a model and a batch, what is ranked by (None: the model's own loss).
    Of several processes ``batches()`` gives each its share, ``agree(make)`` gives all what ``make``
    returns on the first, ``gather(value)`` everybody's by rank, and ``gradients(copy)`` steps a
    copy of the model as they step together.
    """

    model: nn.Module
    optimizer: Optimizer
    max_steps: int
    batches: Callable[[], Batches]
    sequence_length: float
    tokens_per_sequence: float | None = None
    attended: float = 1.0
    budget: Budget | None = None
    make_optimizer: Callable[[nn.Module], Optimizer] | None = None
    costs: StepCosts | None = None
    compute_loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None
    rank: int = 0
    processes: int = 1
    agree: Callable[[Callable[[], Any]], Any] = lambda make: make()
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    gradients: Gradients = own_gradients
    seed: int = 0
    step: int = 0
    plan: Plan | None = None
    scores: Scores | None = None
    events: list[str] = field(default_factory=list)


class Method:
    """Base of every method: hooks that do nothing.

    Order in a run: ``begin``, then per optimizer step ``begin_step`` (before the forward pass) and
    ``before_step`` (gradients are there, the optimizer has not moved yet). ``state`` and
    ``resume`` carry a method across a killed process.
    """

    name = "dense"
    summary = "every parameter trains"
    learning_rate = 5e-5
    schedule = "linear"
    needs_budget = False

    def begin(self, run: Run) -> None:
        """Before the first step."""

    def begin_step(self, run: Run) -> None:
        """Before the step's forward pass; ``run.step`` steps are done."""

    def before_step(self, run: Run) -> None:
        """Gradients are ready, the optimizer has not moved."""

    def needs_eager(self) -> str | None:
        """What it does within a step that no CUDA graph can hold; None if nothing."""
        acts = type(self).before_step is not Method.before_step
        return f"{self.name} looks at the gradients" if acts else None

    def state(self) -> dict[str, Tensor]:
        """Tensors to put into a checkpoint."""
        return {}

    def resume(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Bring a fresh run to where ``run.step``, ``run.plan`` and ``tensors`` say it was.

        Called instead of ``begin``, before weights and optimizer state are loaded.
        """

    def options(self) -> dict[str, Any]:
        """The method's settings, for the report."""
        return {k: v for k, v in vars(self).items() if not k.startswith("_")}

    def budget_of(self, run: Run) -> Budget:
        """The run's budget. Raises UsageError where the method needs one and has none."""
        if run.budget is None:
            raise UsageError(f"budget: expected one for method {self.name}, got none")
        return run.budget
