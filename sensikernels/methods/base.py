"""The base of a fine-tuning method: hooks around the steps of a run, and options with help."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from sensikernels._core.errors import UsageError
from sensikernels.hf import apply
from sensikernels.masks import Budget, Geometry, Plan, Scores, StepCosts
from sensikernels.optim import SubsetAdamW
from sensikernels.world import ALONE, World

Batch = Mapping[str, Tensor]
Batches = Iterable[Batch]


@dataclass(kw_only=True, eq=False)
class Run:
    """A fine-tuning run as a method sees it.

    ``step`` counts finished optimizer steps; ``batches()`` yields this process's share of the
    training batches for ranking, the same ones at every call; ``geometry`` is that of the batches
    to train on. ``make_optimizer`` gives a copy of the model an optimizer like the run's, to time
    steps for a ``step_time`` budget; ``costs`` were measured earlier (None: measured when needed).
    ``trimmed_at``: the step before which this run itself trimmed the model.
    ``compute_loss``: the loss of a model and a batch to rank by (None: the model's own).
    """

    model: nn.Module
    optimizer: Optimizer
    max_steps: int
    batches: Callable[[], Batches]
    geometry: Geometry
    world: World = ALONE
    budget: Budget | None = None
    make_optimizer: Callable[[nn.Module], Optimizer] | None = None
    costs: StepCosts | None = None
    compute_loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None
    seed: int = 0
    step: int = 0
    plan: Plan | None = None
    trimmed_at: int | None = None
    scores: Scores | None = None
    events: list[str] = field(default_factory=list)

    @property
    def inner_optimizer(self) -> Any:
        """The optimizer itself, inside accelerate's wrapper or not."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def subset_adamw(self, who: str) -> SubsetAdamW:
        """The optimizer, which freezes entries. Raises UsageError for another: ``who`` needs it."""
        inner = self.inner_optimizer
        if not isinstance(inner, SubsetAdamW):
            kind = type(inner).__name__
            raise UsageError(f"optimizer: expected SubsetAdamW for {who}, got {kind}")
        return inner


def option(default: Any, help: str) -> Any:
    """A field of a method that its users set: ``key=value`` on the command line."""
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True, eq=False)
class Method:
    """Base of every method: hooks that do nothing.

    Order in a run: ``begin``, then per optimizer step ``begin_step`` (before the forward pass) and
    ``before_step`` (gradients are there, the optimizer has not moved yet). ``state`` and
    ``resume`` carry a method across a killed process.
    """

    name: ClassVar[str] = "dense"
    summary: ClassVar[str] = "every parameter trains"
    learning_rate: ClassVar[float] = 5e-5
    schedule: ClassVar[str] = "linear"
    needs_budget: ClassVar[bool] = False
    granularity: str = field(default="heads", init=False)
    """The units that a plan of this method trims."""
    needs_whole_gradients: ClassVar[bool] = False
    """Whether gradients must not be sharded among processes."""

    @classmethod
    def planned(cls, plan: Plan, **options: Any) -> Method:
        """The method with a plan made earlier. Raises UsageError where it takes none."""
        raise UsageError(f"plan: expected none for method {cls.name}, got one of {plan.method}")

    def begin(self, run: Run) -> None:
        """Prepare the run before its first step."""

    def begin_step(self, run: Run) -> None:
        """Act before the step's forward pass; ``run.step`` steps are done."""

    def before_step(self, run: Run) -> None:
        """Act on the gradients before the optimizer moves."""

    def loss(self, run: Run, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """The loss [] of a batch, of ``forward``: ``run.model``, or DDP or FSDP around it."""
        loss: Tensor = forward(**batch).loss
        return loss

    def rate_factor(self, run: Run) -> float:
        """What the schedule's learning rate of this step is multiplied by."""
        return 1.0

    def end(self, run: Run) -> None:
        """Make ``run.model`` one that can be saved plain, after its last step and measurements."""

    @property
    def has_own_loss(self) -> bool:
        """True if the loss is not the model's own."""
        return type(self).loss is not Method.loss

    def settled(self, run: Run) -> bool:
        """True once the model is the one that the run will save."""
        return run.plan is not None or not self.needs_budget

    def shape(self, model: nn.Module, plan: Plan) -> None:
        """Give a fresh ``model`` the layers it had under ``plan``; weights are loaded after it."""
        if plan.weight_masks or plan.trainable is not None:
            apply(model, plan)

    def needs_eager(self) -> str | None:
        """The reason why no CUDA graph can hold its step; None if one can."""
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
        return {f.name: getattr(self, f.name) for f in fields(self) if "help" in f.metadata}

    def budget_of(self, run: Run) -> Budget:
        """The run's budget. Raises UsageError where the method needs one and has none."""
        if run.budget is None:
            raise UsageError(f"budget: expected one for method {self.name}, got none")
        return run.budget
