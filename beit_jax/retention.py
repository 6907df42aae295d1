"""Which checkpoints stay."""

from collections.abc import Mapping

from orbax.checkpoint import checkpoint_managers

from beit_jax.errors import UserError


class Best(checkpoint_managers.PreservationPolicy):
    """Preserves the best of the checkpoints that were evaluated.

    They are saved before they are evaluated, so that Orbax's own policy, which wants the scores at
    that time, does not serve.
    """

    def __init__(self, name: str, maximize: bool, evaluations: Mapping[int, Mapping]):
        """`name` is the metric; `evaluations` are those of an earlier attempt, by update."""
        self._name, self._maximize = name, maximize
        self._scores = {
            step: scores[name] for step, scores in evaluations.items() if name in scores
        }

    def note(self, step: int, scores: Mapping[str, float]) -> None:
        """Notes an evaluation; raises UserError where it has not the metric."""
        if self._name not in scores:
            raise UserError(
                f"config.eval.best={self._name!r} is not among the evaluation metrics "
                f"({', '.join(sorted(scores))}); name one of them."
            )
        self._scores[step] = scores[self._name]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Orbax's question: for each checkpoint, whether it stays."""
        found = {each.step: self._scores.get(each.step) for each in checkpoints}
        known = [step for step, score in found.items() if score is not None and score == score]
        best = (max if self._maximize else min)(known, key=found.get, default=None)
        return [each.step == best for each in checkpoints]
